#!/usr/bin/env bash
# Install the Debian packages that the demo and the tests use, where they are absent and this user may.
#   bash tests/install_debian.sh wordnet-base chromium
set -u
missing=()
for package in "$@"; do
  case $package in
    wordnet-base) [ -f /usr/share/wordnet/index.noun ] || missing+=("$package") ;;
    *) command -v "$package" >/dev/null || missing+=("$package") ;;
  esac
done
[ ${#missing[@]} -eq 0 ] && exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${missing[@]}"; } \
    >/tmp/clipmill-apt.log 2>&1 && exit 0
fi
echo "not installed: ${missing[*]} (as root: apt-get install ${missing[*]}); what needs them will say so" >&2
exit 0

#!/usr/bin/env bash
# Install the Debian packages that the demo and the tests use, where they are absent and this user may.
#   bash tests/install_debian.sh wordnet-base chromium
set -u
missing=()
for package in "$@"; do
  case $package in
    wordnet-base) [ -f /usr/share/wordnet/index.noun ] || missing+=("$package") ;;
    openclipart-png | openclipart-svg) [ -d "/usr/share/openclipart/${package#*-}" ] || missing+=("$package") ;;
    tuxpaint-stamps-default) [ -d /usr/share/tuxpaint/stamps ] || missing+=("$package") ;;
    mate-backgrounds) [ -d /usr/share/backgrounds/mate ] || missing+=("$package") ;;
    ukui-wallpapers) [ -f /usr/share/backgrounds/calla.png ] || missing+=("$package") ;;
    slurm-client) command -v sbatch >/dev/null || missing+=("$package") ;;
    *) command -v "$package" >/dev/null || [ -x "/usr/sbin/$package" ] || missing+=("$package") ;;
  esac
done
[ ${#missing[@]} -eq 0 ] && exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  policy=/usr/sbin/policy-rc.d # keeps packages from starting services of their own
  [ -e $policy ] || { printf '#!/bin/sh\nexit 101\n' >$policy && chmod 755 $policy && trap 'rm -f $policy' EXIT; }
  { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${missing[@]}"; } \
    >/tmp/clipmill-apt.log 2>&1 && exit 0
fi
echo "not installed: ${missing[*]} (as root: apt-get install ${missing[*]}); what needs them will say so" >&2
exit 0

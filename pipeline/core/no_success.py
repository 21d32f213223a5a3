"""What a stage says that ends without one sample: the most common reason, and what to try."""

import re
from collections.abc import Mapping

from shards_spec.layout import STAGES
from shards_spec.messages import conversion, counted

# (pattern of a reason, what to try); the first pattern that matches the whole reason counts
ADVICE = (
    (
        r"not a public address",
        "--allow-private fetches from addresses of one's own network",
    ),
    (
        r"timeout|connection .*|name .*|HTTP 407",
        "is this machine on the web? No proxy is used; --timeout-s gives more time",
    ),
    (
        r"HTTP 40[13]|HTTP 429",
        "the servers refuse: give signed links, or try later with --retry-failed and a lower --per-host",
    ),
    (
        r"HTTP \d+",
        "open one of the links in a browser: they may be old, or --url-col may be another column",
    ),
    (
        r"opted out",
        "the owners opted out; --ignore-opt-out takes their images all the same",
    ),
    (
        r"not an http address|bad address|address .*|missing column",
        "name the columns with --url-col and --caption-col, or the form of the list with --format",
    ),
    (
        r"file not found|file not readable|link to .*",
        "paths are read relative to the folder of the list: is the list where it was made?",
    ),
    (
        r"resize: too many pixels.*|too large|cell too large",
        "--max-bytes and --max-pixels are the limits",
    ),
    (
        r".*(too small|aspect ratio).*",
        "--min-size and --max-aspect-ratio are the limits",
    ),
    (
        r"caption (too short|too long).*",
        "--min-caption-chars and --max-caption-chars are the limits; is --caption-col right?",
    ),
    (
        r"caption is not UTF-8|every caption of the list not UTF-8",
        f"the list has another encoding; if it is latin-1, {conversion('LATIN1', 'LIST')}",
    ),
    (
        r"caption (is|has|repeats).*|caption not readable",
        "is --caption-col right? --sane-captions leaves odd ones out",
    ),
    (
        r"damaged tar|.*not a tar",
        "download the tar again, or give another --format",
    ),
    (
        r"lost in a damaged shard",
        "`clipmill check --repair` reads them again where --source says that their source is",
    ),
    (
        r"excluded .*",
        "the files of --exclude name them",
    ),
    (
        r"every caption of the list no text",
        "captions are texts or lists of texts: is --caption-col right?",
    ),
    (
        r"no caption in the list|every caption of the list unusable|nothing in raw to join it by",
        "is --from a list of this dataset's images, and --by the column that both have?",
    ),
    (
        r"server: empty answer",
        "the server answers without text: a model that thinks first needs a higher --max-tokens; --prompt is what it "
        "is asked",
    ),
    (
        r"server: caption too long",
        "the answers are no captions: ask for one sentence with --prompt, and lower --max-tokens",
    ),
    (
        r"server: .*",
        "the log has what the server said of each image",
    ),
    (
        r"its tar is not in --from|not in its tar|no uid or tar in its json member",
        "--from takes what ROOT was ingested from, named as --source named it",
    ),
    (
        r"(other|no) sha256 .*",
        "the images are no longer those of the list, or --sha256-col is another hash; without it all are taken",
    ),
    (
        r"not in the list of --from",
        "does the list name samples of this dataset, by a key, or a URL, sha256 or uid that raw/ has a column of?",
    ),
    (
        r"in the list of --drop",
        "the files of --drop name them",
    ),
    (
        r"no synset in the caption",
        "--balance draws by synsets; `clipmill pack` labels captions",
    ),
    (
        r"no caption|caption empty.*",
        "run `clipmill caption`, or give ingest the captions (--caption-col, x.txt beside x.jpg)",
    ),
    (
        r"every caption below min_similarity",
        "lower --min-similarity; `clipmill report` shows the distribution of the cosines",
    ),
    (
        r"(near-)?duplicate image",
        "delete dedup/ to keep every image, or lower --near-bits",
    ),
    (
        r"not .+ ([<>=!]+|in|is) .*|no caption meets --captions-where",
        "does the condition say what is meant? `clipmill why ROOT KEY` shows what is known of a sample",
    ),
    (
        r"decoding took too long|decoder crashed",
        "--decode-timeout-s gives more time; look at one of the files",
    ),
    (
        r".*(not an image|decode|format).*",
        "look at one of the files: are they images, of a format that is read?",
    ),
    (
        r"not .*",
        "ease the condition; `clipmill report` counts all reasons",
    ),
)


def advice_for(reason: str) -> str:
    """What to try where inputs were left out for a reason."""
    advice = next((advice for pattern, advice in ADVICE if re.fullmatch(pattern, reason)), None)
    return advice or "`clipmill report` counts all reasons"


def explain_no_success(command: str, counts: Mapping[str, int]) -> str | None:
    """Why a finished stage has no sample, and what to try; None when it has one.

    ``counts`` are the stage's totals: ``success`` or a reason to the number of inputs.
    """
    if counts.get("success"):
        return None
    total = sum(counts.values())
    if not total:
        if STAGES[command].reads is None:
            return f"{command}: no samples, because the list has none; check it"
        return f"{command}: no samples, because {STAGES[command].reads_folder}/ has none; check the previous stage"
    reason = max(counts, key=lambda name: counts[name])
    return (
        f"{command}: none of {counted(total, 'input')} became a sample; the most common reason, "
        f"{counted(counts[reason], 'time')}, "
        f"is {reason!r}: {advice_for(reason)}"
    )

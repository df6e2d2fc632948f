"""How fast and in how much memory a large text is read, encoded and mapped.

Writes a text of `--gb` gigabytes (ASCII words and Chinese characters, so that blocks cut
characters) to a temporary folder, loads it in a process of its own, twice, and prints the peak
memory of that process, the speed of the first load and the seconds of the second, which finds
everything in the cache. The limit is 1 GB of memory whatever the size of the text.

    python benchmarks/stream.py --gb 2
    python benchmarks/stream.py --gb 0.2 --tokenizer bpe:4096
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from addnorm.data.text import load_text

LIMIT = 2**30


def write_text(path: Path, size: int) -> None:
    """Write `size` bytes of words drawn from a skewed distribution, in lines."""
    rng = np.random.default_rng(0)
    letters = "etaoinshrdlucmfwypvbgkjqxz"
    words = ["".join(rng.choice(list(letters), rng.integers(1, 10))) for _ in range(20_000)]
    words += [
        "".join(map(chr, rng.integers(0x4E00, 0x4E00 + 4000, rng.integers(1, 5))))
        for _ in range(5_000)
    ]
    order = rng.permutation(len(words))
    with open(path, "wb") as file:
        while (left := size - file.tell()) > 0:
            ranks = rng.zipf(1.3, 200_000) % len(words)
            drawn = [words[i] for i in order[ranks]]
            lines = [" ".join(drawn[i : i + 12]) for i in range(0, len(drawn), 12)]
            block = ("\n".join(lines) + "\n").encode()
            if len(block) > left:
                block = b"x" * (left - 1) + b"\n"
            file.write(block)


def load(path: Path, tokenizer: str) -> None:
    """Load the text twice and print what was measured, as JSON."""
    seconds = []
    for _ in range(2):
        began = time.perf_counter()
        data = load_text(str(path), 1024, tokenizer)
        data.training_batch(0, 0, 32)
        seconds.append(time.perf_counter() - began)
        facts = data.describe()
        del data
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"peak": peak, "seconds": seconds, **facts}))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gb", type=float, default=2.0, help="size of the text in 10^9 bytes")
    parser.add_argument("--tokenizer", default="char", help="char, byte, bpe or bpe:VOCABULARY")
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        load(options.load, options.tokenizer)
        return 0
    size = round(options.gb * 1e9)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "large.txt"
        write_text(path, size)
        time.sleep(3)  # a file is trusted to be unchanged once it is older than the clock's tick
        done = subprocess.run(
            [sys.executable, __file__, "--load", path, "--tokenizer", options.tokenizer],
            env=os.environ | {"XDG_CACHE_HOME": folder},
            stdout=subprocess.PIPE,
            check=True,
        )
    facts = json.loads(done.stdout)
    first, second = facts["seconds"]
    print(f"text               {facts['bytes'] / 1e6:10,.0f} MB, {facts['tokens']:,} tokens")
    print(f"vocabulary         {facts['vocab_size']:10,}")
    print(f"first load         {first:10.1f} s, {facts['bytes'] / 1e6 / first:.0f} MB/s")
    print(f"second load        {second:10.2f} s")
    print(f"peak memory        {facts['peak'] / 1e6:10,.0f} MB (limit {LIMIT / 1e6:,.0f} MB)")
    return int(facts["peak"] >= LIMIT)


if __name__ == "__main__":
    sys.exit(main())

"""Compares a checkpoint of any size with transformers, layer by layer: ``fpwap verify`` by another name.

    python tools/verify_arch.py MODEL [--layers 0,1,-1] [--dtype float32] [--prompts FILE]
    python tools/verify_arch.py --draft MODEL

Exit code 0: every bit is equal; 1: something differs; 2: the model or the request is refused.
"""

import sys

from fpwap.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["verify", *sys.argv[1:]]))

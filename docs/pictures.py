"""Draws docs/pictures/*.svg: what the `tpc` commands show, as they show it. Run it from the repository's root."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

PICTURES = Path(__file__).parent / "pictures"
COMMANDS = {  # picture → arguments, width
    "shard": ("shard models/gpt2.py --spec specs/gpt2-8.3b.yaml", 120),
    "diff": ("diff models/gpt2.py --spec specs/gpt2-8.3b.yaml", 180),
    "explain": ("explain models/gpt2.py --spec specs/gpt2-8.3b.yaml h.0.attn", 120),
    "verify": ("verify models/llama.py --spec specs/2way.yaml", 120),
}


def main() -> None:
    PICTURES.mkdir(exist_ok=True)
    for name in sys.argv[1:] or COMMANDS:
        arguments, width = COMMANDS[name]
        print(f"tpc {arguments}")
        command = [sys.executable, "-m", "tpcompiler.cli.main", *arguments.split()]
        shown = subprocess.run(
            command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, "FORCE_COLOR": "1"}
        )
        console = Console(record=True, width=width, file=io.StringIO(), force_terminal=True)
        console.print(Text.from_ansi(shown.stdout.rstrip()))
        console.save_svg(str(PICTURES / f"{name}.svg"), title=f"tpc {arguments}", unique_id=name)


if __name__ == "__main__":
    main()

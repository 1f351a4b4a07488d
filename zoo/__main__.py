"""Look at the zoo: ``python -m zoo`` lists the architectures, ``python -m zoo NAME`` shows one; no torch is loaded."""

import argparse
import difflib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from zoo import catalogue, page
from zoo.card import card, cards, numbers
from zoo.show import show_card, show_table

REFUSED = 2  # exit status of what a user can correct


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line.

    Returns:
        Exit status: 0, or 2 with one line on standard error for a name that is not in the zoo.
    """
    parser = argparse.ArgumentParser(prog="python -m zoo", description="The architectures of conf/model/.")
    parser.add_argument("name", nargs="?", metavar="NAME", help="one architecture, as model= takes it: shown in depth")
    parser.add_argument("--tiny", action="store_true", help="list the sizes for a CPU too")
    parser.add_argument("--json", action="store_true", help="for programs: numbers, in ones and bytes")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="renew the first part of docs/zoo.md")
    given = parser.parse_args(arguments)
    try:
        if given.markdown:
            page.renew(given.markdown)
        elif given.name:
            _one(given.name, as_json=given.json)
        else:
            _all(tiny=given.tiny, as_json=given.json)
    except BrokenPipeError:  # who reads has seen enough, as head has; nothing is left to be flushed there
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return REFUSED
    return 0


def _one(name: str, *, as_json: bool) -> None:
    known = [*catalogue.sizes(), *catalogue.tiny_ones(), *_cards_only()]
    if name not in known:
        close = difflib.get_close_matches(name, known, n=4, cutoff=0.5)
        hint = f"did you mean {' or '.join(close)}?" if close else "python -m zoo lists them"
        raise ValueError(f"{name}: is not in the zoo; {hint}")
    if as_json:
        print(json.dumps(numbers(card(name)), indent=2, ensure_ascii=False))
    else:
        show_card(card(name), Console(highlight=False))


def _all(*, tiny: bool, as_json: bool) -> None:
    listed = cards(catalogue.sizes())
    listed += cards(catalogue.tiny_ones()) if tiny else []
    if as_json:
        print(json.dumps([numbers(one) for one in listed], indent=2, ensure_ascii=False))
    else:
        show_table([*listed, *cards(_cards_only())], Console(highlight=False))


def _cards_only() -> list[str]:
    return [*catalogue.without_dimensions(), *catalogue.stand_ins()]


if __name__ == "__main__":
    sys.exit(main())

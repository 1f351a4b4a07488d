"""Look at the zoo: ``python -m zoo`` lists the architectures, ``python -m zoo NAME`` shows one; no torch is loaded."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from difflib import SequenceMatcher, get_close_matches
from io import TextIOWrapper
from pathlib import Path
from typing import NoReturn

from zoo import catalogue, page
from zoo.card import card, cards, numbers
from zoo.show import Screen, show_card, show_table

REFUSED = 2  # exit status of what a user can correct
OPTIONS = ["--tiny", "--json", "--markdown", "--help"]
CLOSE = 0.5  # how alike a name is that is worth a hint, of 1


class Parser(argparse.ArgumentParser):
    """Faults of the command line are errors as all others are: one line, no usage."""

    def error(self, message: str) -> NoReturn:
        """What argparse itself finds wrong.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"{message.removeprefix('argument ')}; python -m zoo --help shows what is allowed")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line.

    Returns:
        Exit status: 0, or 2 with one line on standard error for what a user can correct.
    """
    if isinstance(sys.stdout, TextIOWrapper):  # a console that cannot encode a character shows a question mark
        sys.stdout.reconfigure(errors="replace")
    try:
        given = _read(arguments)
        if given.markdown:
            page.renew(given.markdown)
        elif given.name:
            _one(given.name, as_json=given.json)
        else:
            _all(tiny=given.tiny, as_json=given.json)
        print(end="", flush=True)  # a reader that is gone is found here, not when the interpreter ends
    except BrokenPipeError:  # who reads has seen enough, as head has; nothing is left to be flushed there
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return REFUSED
    return 0


def _read(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m zoo", description="The architectures of conf/model/.")
    parser.add_argument("name", nargs="?", metavar="NAME", help="one architecture, as model= takes it: shown in depth")
    parser.add_argument("--tiny", action="store_true", help="list the sizes for a CPU too")
    parser.add_argument("--json", action="store_true", help="for programs: numbers, in ones and bytes")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="renew the first part of docs/zoo.md")
    given, unknown = parser.parse_known_args(arguments)
    for word in unknown:
        if word.startswith("-"):
            close = get_close_matches(word.partition("=")[0], OPTIONS, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ValueError(f"{word}: must be one of {', '.join(OPTIONS)}{hint}")
    if unknown:
        raise ValueError(f"NAME={' '.join([given.name, *unknown])}: must be one architecture; python -m zoo lists them")
    return given


def _one(name: str, *, as_json: bool) -> None:
    known = [*catalogue.sizes(), *catalogue.tiny_ones(), *_cards_only()]
    if name not in known:
        close = _like(name, known)[:4]
        hint = f"did you mean {' or '.join(close)}?" if close else "python -m zoo lists them"
        raise ValueError(f"{name}: is not in the zoo; {hint}")
    if as_json:
        print(json.dumps(numbers(card(name)), indent=2))
    else:
        show_card(card(name), Screen())


def _like(name: str, known: list[str]) -> list[str]:
    """Names like one, the likest first: those that begin with it come before those that resemble it."""
    wanted = _folded(name)

    def key(other: str) -> tuple[bool, float]:
        return _folded(other).startswith(wanted), SequenceMatcher(None, _folded(other), wanted).ratio()

    keys = {other: key(other) for other in known} if wanted else {}
    return sorted((other for other in keys if max(keys[other]) >= CLOSE), key=lambda other: keys[other], reverse=True)


def _folded(name: str) -> str:
    """A name without what spellings differ in: GPT-4o is gpt4o."""
    return "".join(character for character in name.casefold() if character not in "-._ ")


def _all(*, tiny: bool, as_json: bool) -> None:
    listed = cards(catalogue.sizes())
    listed += cards(catalogue.tiny_ones()) if tiny else []
    if as_json:
        print(json.dumps([numbers(one) for one in listed], indent=2))
    else:
        show_table([*listed, *cards(_cards_only())], Screen())


def _cards_only() -> list[str]:
    return [*catalogue.without_dimensions(), *catalogue.stand_ins()]


if __name__ == "__main__":
    sys.exit(main())

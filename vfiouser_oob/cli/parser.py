"""The parser that all sub-commands share: what help looks like, and what a mistake is told."""

from __future__ import annotations

import argparse
import difflib
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from vfiouser_oob.cli.errors import ExitCode
from vfiouser_oob.observability import log


class HelpText(argparse.HelpFormatter):
    """Help that breaks lines at spaces only, tells every default, and keeps lines that were laid out already."""

    def __init__(self, *args: Any, **options: Any) -> None:
        # Room for the longest command's name, and for most options, on the line of its help.
        options.setdefault("max_help_position", 28)
        super().__init__(*args, **options)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return _wrapped(text, width)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if "\n" in text:
            return text
        return "\n".join(indent + line for line in _wrapped(text, width - len(indent)))

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        told = action.default not in (None, False, "", argparse.SUPPRESS) and action.nargs != 0
        return f"{text} (default: %(default)s)" if told and "default:" not in text else text

    def _format_action(self, action: argparse.Action) -> str:
        if isinstance(action, argparse._SubParsersAction):
            # The commands alone, at the margin of their title.
            return "".join(super(HelpText, self)._format_action(one) for one in action._get_subactions())
        return super()._format_action(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        # As Python 3.13 has it: the value's name once, behind all names of the option.
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        value = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{', '.join(action.option_strings)} {value}"


def _wrapped(text: str, width: int) -> list[str]:
    # A hyphen is a part of many words here, `msgpack-rpc:` for one, and such a word is copied.
    return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False, break_long_words=False)


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def __init__(self, *args: Any, **options: Any) -> None:
        options.setdefault("formatter_class", HelpText)
        super().__init__(*args, **options)

    def error(self, message: str) -> NoReturn:
        """Print the error and end the process with exit code 2."""
        log.write_last([f"{self.prog}: {message} (see {self.prog} --help)"])
        self.exit(ExitCode.USAGE)

    def check_options(self, arguments: Sequence[str]) -> None:
        """End the process if an option is unknown; argparse would tell of a missing one first, and suggest nothing.

        Args:
            arguments: those of this parser.
        """
        if any(action.nargs == argparse.REMAINDER for action in self._actions):
            return
        known = [name for action in self._actions for name in action.option_strings]
        for argument in arguments:
            if argument == "--":
                return
            name = argument.partition("=")[0]
            if name.startswith("--") and not any(option.startswith(name) for option in known):
                self.error(f"there is no option {name}{did_you_mean(name, known)}")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown word: the nearest that there is, if one is near."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""

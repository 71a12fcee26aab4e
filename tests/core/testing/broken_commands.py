"""Commands and callbacks with one fault each, and faults that a part of any kind can have."""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from broken_parts import Broken, Sound
from pydantic import Field, field_serializer

import pegboard

__all__ = ["BROKEN", "SOUND"]


class Count(pegboard.Command):
    """Count the lines of a file."""

    name = "count-lines"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("file", help="a text file")

    def run(self, arguments: argparse.Namespace, plugins: Any) -> Any:
        try:
            lines = Path(arguments.file).read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            raise pegboard.DataError(f"{arguments.file}: no such file") from None
        print(len(lines))
        return 0


class Shouting(Count):
    """Count the lines of a file."""

    name = "COUNT"


class Wordless(Count):
    """Count lines"""


class Bare(Count):
    """Count the lines of a file."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("file")


class Heavy(Count):
    """Count the lines of a file."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        import torch

        parser.add_argument("file", help=f"a text file, read with torch {torch.__version__}")


class Codeless(Count):
    """Count the lines of a file."""

    def run(self, arguments: argparse.Namespace, plugins: Any) -> Any:
        super().run(arguments, plugins)


class Tracing(Count):
    """Count the lines of a file."""

    def run(self, arguments: argparse.Namespace, plugins: Any) -> Any:
        return 0 * len(Path(arguments.file).read_text(encoding="utf-8"))


class Told(pegboard.Callback):
    """A callback without a fault."""

    def on_step_end(self, event: pegboard.StepEnd) -> str | None:
        return "low enough" if event.metrics["loss"] < 0.1 else None


class Misspelt(Told):
    def on_checkpoint_save(self, event: pegboard.CheckpointSaved) -> None: ...


class Flagging(Told):
    def on_step_end(self, event: pegboard.StepEnd) -> Any:
        return event.metrics["loss"] > 0.1


class Meddling(Told):
    def on_step_end(self, event: pegboard.StepEnd) -> str | None:
        dict.clear(event.metrics)  # type: ignore[arg-type]
        return None


class Whole(Told):
    def on_step_end(self, event: pegboard.StepEnd) -> str | None:
        int(event.metrics["loss"])
        return None


class Expectant(Told):
    def on_train_end(self, event: pegboard.TrainEnd) -> None:
        assert event.stopped is None, "stopped"


class Hopeful(Told):
    def on_train_error(self, event: pegboard.TrainFailure) -> None:
        assert event.step > 0, "no step"


class Impatient(Told):
    def on_train_end(self, event: pegboard.TrainEnd) -> None:
        assert event.step < event.total_steps, "at its end"


def callback(told: Callable[[], Any]) -> type[pegboard.CallbackComponent]:
    class Called(pegboard.CallbackComponent):
        """A callback."""

        config: Any

        def build(self, run_dir: Path) -> Any:
            return told()

    return Called


class OnceOnly(pegboard.CallbackComponent):
    """A callback that can't be resumed."""

    config: Any

    def build(self, run_dir: Path) -> pegboard.Callback:
        return Once(run_dir)


class Once(Told):
    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir

    def on_train_start(self, event: pegboard.TrainStart) -> None:
        if event.resumed_from is not None:
            raise ValueError("begun before")


class Anything(pegboard.LRScheduleComponent):
    """A schedule that is always the same."""

    class Config(pegboard.ComponentConfig):
        power: float = Field(default=1.0, description="A power.")

    config: Any

    def build(self, total_steps: int) -> Any:
        return lambda step, base: base


class BaselessAnything(Anything):
    """A schedule that says it is a packer."""

    kind = "packer"


class UndescribedAnything(Anything):
    """A schedule with a field that nobody explains."""

    class Config(pegboard.ComponentConfig):
        power: float = 1.0


class UndeclaredAnything(Anything):
    """A schedule that does not say that its config is its own."""

    class Config(pegboard.ComponentConfig):
        power: float = Field(default=1.0, description="A power.")


class SilentAnything(Anything):
    __doc__ = None


class LooseAnything(Anything):
    """A schedule that takes any key."""

    class Config(pegboard.ComponentConfig):
        model_config = {"extra": "ignore"}
        power: float = Field(default=1.0, description="A power.")

    config: Any


class ObliviousAnything(Anything):
    """A schedule that forgets its config."""

    def __init__(self, config: Any) -> None:
        super().__init__(type(config)())


class SharingAnything(Anything):
    """A schedule whose instances share a list."""

    asked: list[int] = []

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.rates = self.asked


class OpenSchemaAnything(pegboard.LRScheduleComponent):
    """A schedule whose schema is none."""

    config_schema = {
        "type": "object",
        "properties": {"power": {"type": "figure", "description": "A power."}},
    }
    config: Any

    def build(self, total_steps: int) -> Any:
        return lambda step, base: base


class RandomAnything(Anything):
    """A schedule that says something else of itself each time."""

    class Config(pegboard.ComponentConfig):
        power: float = Field(default=1.0, description="A power.")

        @field_serializer("power")
        def _say(self, power: float) -> float:
            return power + random.random()

    config: Any


WORDS = {"arguments": [__file__], "refused": ["no/such/file.txt"]}
SOUND = {"command": Sound(Count, {}, WORDS), "callback": Sound(callback(Told))}


def _command(fault: str, check: str, cls: type[Count]) -> Broken:
    return Broken(fault, check, cls, {}, WORDS)


def _callback(fault: str, check: str, told: Callable[[], Any], *also: str) -> Broken:
    return Broken(fault, check, callback(told), also=frozenset(also))


def _unregistered(fault: str, check: str, cls: type[Anything]) -> Broken:
    return Broken(fault, check, cls, also=frozenset({"registers"}))


BROKEN = [
    _command("has a name that no command may have", "registers", Shouting),
    _command("says what it does in no sentence", "says_what_it_does", Wordless),
    _command("leaves an argument unexplained", "explains_every_argument", Bare),
    _command("imports torch for its help", "help_is_light", Heavy),
    _command("gives no exit code", "a_run_gives_an_exit_code", Codeless),
    _command("shows the user a traceback", "an_error_of_the_user_is_one_message", Tracing),
    _callback("has a misspelt event", "its_methods_are_events", Misspelt),
    _callback(
        "fails with a run that failed before its first step", "takes_a_run_that_fails", Hopeful
    ),
    _callback("fails with a run that was stopped", "takes_a_run_that_is_stopped", Expectant),
    _callback(
        "fails with a run that came to its end",
        "takes_a_whole_run",
        Impatient,
        "may_be_built_again",
    ),
    Broken("can't go on after a resume", "may_be_built_again", OnceOnly),
    _callback("asks for a stop with a flag", "asks_for_a_stop_in_words", Flagging),
    _callback("clears the numbers that others are told", "leaves_the_facts_alone", Meddling),
    _callback("can't take NaN", "takes_numbers_that_are_not_finite", Whole),
    _unregistered("has another kind than its base", "is_a_part_of_its_kind", BaselessAnything),
    _unregistered(
        "has a field without a description", "describes_every_field", UndescribedAnything
    ),
    _unregistered("has no docstring", "says_what_it_is", SilentAnything),
    Broken("leaves out the line `config: Config`", "registers", UndeclaredAnything),
    Broken("takes any key", "config_is_strict_and_frozen", LooseAnything),
    Broken("forgets the config it was given", "init_keeps_the_config", ObliviousAnything),
    Broken("shares a list between its instances", "mutable_state_is_not_shared", SharingAnything),
    Broken(
        "declares a schema that is none",
        "config_schema_is_sound",
        OpenSchemaAnything,
        also=frozenset(
            {
                "config_survives_json",
                "init_keeps_the_config",
                "mutable_state_is_not_shared",
                "registers",
            }
        ),
    ),
    Broken("says another config each time", "config_survives_json", RandomAnything),
]

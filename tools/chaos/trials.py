"""One trial: start the work, strike, wait, look at what is left, and let the same command finish it."""

import random
import shutil
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import verdicts
from faults import NO_NAMESPACE_EXIT, Fault, NotPossibleError, Plan, Scene
from processes import Program, start
from workloads import Material, Result, Work

PLACE = "r\u00fan"  # the name of every result's folder
GOOD, IMPOSSIBLE = "good", "not possible here"

LAUNCHER_LOST = "as the end of its launcher asked"  # deepspeed returns 0 if a signal has ended its launch.py

stopping = threading.Event()  # the driver ends: running trials are dropped


@dataclass
class Record:
    """One line of the record."""

    seed: int
    work: str
    fault: str
    family: str
    moment: str
    verdict: str = GOOD
    codes: list[int | None] = field(default_factory=list)  # of each program, None if it hung
    struck: bool = True
    again: bool = False  # whether the same command was needed once more
    seconds: float = 0.0
    last_sentence: str = ""
    complaints: list[str] = field(default_factory=list)
    commands: list[list[str]] = field(default_factory=list)

    def line(self) -> dict[str, Any]:
        """Return what is written."""
        return asdict(self)


class Trial:
    """A plan that is carried out in a folder of its own."""

    def __init__(self, plan: Plan, material: Material):
        self.plan, self.material = plan, material
        self.folder = material.folder.parent / f"trial-{plan.seed}"
        self.place = self.folder / "place" / PLACE
        self.record = Record(plan.seed, plan.work.name, plan.fault.name, plan.fault.family, str(plan.moment))
        self.programs: list[Program] = []
        self.limit_s = 240.0 if plan.work.ranks else 150.0
        self.grace_s = 40.0 if plan.work.ranks else 8.0

    def run(self) -> Record:
        """Return what became of it."""
        began = time.monotonic()
        shutil.rmtree(self.folder, ignore_errors=True)
        self.place.parent.mkdir(parents=True)
        try:
            reference = self.material.reference(self.plan.work)
            began = time.monotonic()
            self.record.complaints = self._complaints(reference)
        except NotPossibleError as error:
            self.record.verdict, self.record.last_sentence = IMPOSSIBLE, str(error)
        except Exception as error:  # of this driver: the others shall be tried nevertheless
            self.record.complaints = [f"driver: {type(error).__name__}: {error}"]
        finally:
            for program in self.programs:
                program.end()
        if self.record.complaints:
            categories = [its.split(":")[0] for its in self.record.complaints]
            self.record.verdict = ", ".join(dict.fromkeys(categories))
        self.record.seconds = round(time.monotonic() - began, 1)
        return self.record

    def _complaints(self, reference: Result) -> list[str]:
        plan, work, fault = self.plan, self.plan.work, self.plan.fault
        rng = random.Random(f"strike {plan.seed}")
        scene = Scene(work, self.place, self.folder, self.material.folder, [], rng)
        scene.programs.extend(self._start("first", scene, fault))
        before, second = self._strike(scene)
        self.record.codes = [program.wait(self.limit_s) for program in scene.programs]
        if NO_NAMESPACE_EXIT in self.record.codes:
            raise NotPossibleError("a mount was refused")
        found = self._look(scene.programs, fault if self.record.struck else Fault(fault.name, fault.family))
        if fault.family == "folder" and self.record.struck:
            for program in second:
                found += [f"second run: {its}" for its in self._look_at(program, ())]
            old = self.place.with_name(fault.folder)
        else:
            old = self.place
        found += self._look_at_results(scene.programs, old, before, reference)
        if not found or verdicts.HANG not in found[0]:
            found += self._again(reference)
        return found

    def _start(self, name: str, scene: Scene | None = None, fault: Fault | None = None) -> list[Program]:
        """Start all programs of the work, with the fault around them if it is given."""
        started = []
        for number in range(self.plan.work.programs):
            if stopping.is_set():
                raise NotPossibleError("the driver was stopped")
            argv = self.plan.work.argv(self.material, self.place, number, self.plan.options)
            if fault and scene:
                self.record.commands.append(argv)
                argv = fault.wrap(scene, argv)
            variables = fault.variables(scene) if fault and scene else {}
            started.append(start(argv, self.folder / f"{name}-{number}", variables))
            self.programs.append(started[-1])
        return started

    def _strike(self, scene: Scene) -> tuple[list[int], list[Program]]:
        """Wait for the moment and strike; return the steps saved before it, and programs started after it."""
        fault = self.plan.fault
        if fault.strike is None:
            return [], []
        self.record.struck = self.plan.moment.wait(scene) and (fault.family != "folder" or self.place.exists())
        before = verdicts.steps_named(self.place) if self.plan.work.trains else []
        if not self.record.struck:
            return before, []
        fault.strike(scene)
        return before, self._start("second") if fault.family == "folder" else []

    def _look(self, programs: Sequence[Program], fault: Fault) -> list[str]:
        """Complain about how programs ended, and keep the last sentence of the first that did not end with 0."""
        found = [its for program in programs for its in self._look_at(program, fault.codes)]
        for program in programs:
            lines = program.text(program.stderr).strip().splitlines()
            if lines and (program.process.returncode or not self.record.last_sentence):
                self.record.last_sentence = lines[-1][:500]
        return found

    def _look_at(self, program: Program, codes: Sequence[int] | frozenset[int]) -> list[str]:
        """Complain about one program; what is left of it is killed."""
        code = program.wait(self.limit_s)
        found = verdicts.of_ending(code, program.survivors(self.grace_s) if code is not None else (), self.limit_s)
        program.end()
        found += verdicts.of_tracebacks(program.text(program.stderr), launcher=self.plan.work.ranks > 0)
        return found + verdicts.of_code(code, codes)

    def _look_at_results(
        self, programs: Sequence[Program], place: Path, before: list[int], reference: Result
    ) -> list[str]:
        """Complain about results that are called finished, or saved, and are not."""
        if not place.exists() and self.plan.fault.folder == "gone" and self.record.struck:
            return []
        found = []
        lost_launcher = self.plan.work.ranks and any(LAUNCHER_LOST in its.text(its.stderr) for its in programs)
        done = all(code == 0 for code in self.record.codes) and not lost_launcher
        if done and self._result(self.plan.work, self.place) != reference:  # where the command was told to write
            found += verdicts.of_done(0, self._result(self.plan.work, place), reference)
        if self.plan.work.trains:
            [program], [code] = programs, self.record.codes
            stdout, stderr = program.text(program.stdout), program.text(program.stderr)
            # A save that ends while its folder is copied may be whole in the copy alone.
            found += verdicts.of_sentences(code, stdout, stderr, place, self.place)
            found += verdicts.of_checkpoints(place, before, int(self.plan.options[-1].split("=")[1]))
        return found

    def _again(self, reference: Result) -> list[str]:
        """Let the same command finish the work, if it is not finished; compare with the reference."""
        if self._result(self.plan.work, self.place) == reference:
            return []
        self.record.again = True
        found, codes = [], []
        for program in self._start("again"):
            codes.append(program.wait(self.limit_s))
            found += [f"{verdicts.DIFFERS}: again: {its}" for its in self._look_at(program, ())]
        return found + verdicts.of_recovery(max(codes, key=lambda c: -1 if c == 0 else c or 999), self._result(
            self.plan.work, self.place), reference)  # fmt: skip

    @staticmethod
    def _result(work: Work, place: Path) -> Result | None:
        """Return the result at a place; None if it is not there."""
        with suppress(Exception):  # half of a result, in any form
            return work.result(place)
        return None

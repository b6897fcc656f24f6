"""One mutation of a kit or a return, followed to the end, in a child process that may die of it."""

import contextlib
import dataclasses
import io
import json
import multiprocessing
import os
import shutil
import traceback
from pathlib import Path

# what a child may take: memory above what it has after its imports, and time for a mutation; a tokenizer has a limited
# child of its own, which may take some of it
MEMORY_MB = 3000
SECONDS = 240

ROWS = ({"prompt": "2 + 3 is", "completion": " 5, or fünf"}, {"prompt": "Say aa.", "completion": "aa\n"})


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a mutation.

    Attributes:
        end: `refused` by verify, `fine` to the end, `late` where a later stage refused it, `broken` otherwise.
        stage: Where that was.
        words: The sentence, or the traceback.
    """

    end: str
    stage: str = ""
    words: str = ""


class Child:
    """A process that works off mutations; where it dies or stands still, another takes its place.

    Args:
        folder: Has a sound kit of every subject, `KIT`, and of one also a return, `KIT.return`.
    """

    def __init__(self, folder):
        self.folder, self._process = folder, None

    def outcome(self, case):
        """Follow one mutation."""
        if self._process is None:
            self._start()
        self._pipe.send(case)
        try:
            if self._pipe.poll(SECONDS):
                return self._pipe.recv()
            words = f"no end within {SECONDS} s"
        except EOFError:
            self._process.join()
            words = f"the process died with code {self._process.exitcode}"
        self.stop()
        return Outcome("broken", "?", words)

    def _start(self):
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_work, args=(other, str(self.folder)), daemon=True)
        self._process.start()
        other.close()
        if not self._pipe.poll(10 * SECONDS):
            raise RuntimeError("the child does not start")
        self._pipe.recv()

    def stop(self):
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._pipe.close()
        self._process = None


def _work(pipe, folder):
    """The child: answer one mutation after the other."""
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)
    route = Route(Path(folder))
    _limit_memory()
    pipe.send("ready")
    with contextlib.suppress(EOFError):
        while True:
            pipe.send(route.follow(pipe.recv()))


def _limit_memory():
    try:
        import resource
    except ImportError:  # Windows
        return
    pages = Path("/proc/self/statm")
    if pages.exists():
        most = int(pages.read_text().split()[0]) * resource.getpagesize() + MEMORY_MB * 10**6
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


class Route:
    """The way of a kit: verify, load, tokenise, one training step, return, plug; of a return: verify, plug.

    Args:
        folder: As for `Child`.
    """

    def __init__(self, folder):
        self.sound, self.place = folder, folder / f"child{os.getpid()}"
        self.stage = ""
        self.rows = folder / "rows.jsonl"
        self.rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")

    def follow(self, case):
        """Write a mutation down and follow it."""
        from siftune.base.errors import InputError

        shutil.rmtree(self.place, ignore_errors=True)
        target = shutil.copytree(self.sound / case.subject, self.place / "mutated")
        try:
            self._write(target, case)
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                (self._return if case.subject.endswith(".return") else self._kit)(target, case.subject)
        except InputError as error:
            return self._refusal(str(error))
        except (Exception, RecursionError, MemoryError):
            return Outcome("broken", self.stage, traceback.format_exc())
        except BaseException as error:  # a panic in Rust is no Exception
            return Outcome("broken", self.stage, f"{type(error)}: {error}")
        finally:
            shutil.rmtree(self.place, ignore_errors=True)
        return Outcome("fine")

    def _write(self, target, case):
        from support.kits import repair

        for name, data in case.files.items():
            (target / name).write_bytes(data)
        if case.repaired:
            repair(target)

    def _refusal(self, words):
        plain = words.isprintable() and len(words) < 1500 + len(str(self.place))
        end = ("refused" if self.stage == "verify" else "late") if plain else "broken"
        return Outcome(end, self.stage, words.replace(str(self.place), ""))

    def _kit(self, target, subject):
        from siftune.cli import verify
        from siftune.offsite.exchange.load import load_kit
        from siftune.offsite.exchange.tune import save_return
        from siftune.offsite.kit.folder import read_kit

        self.stage = "verify"
        verify.run(verify.Options(target))
        self.stage = "load"
        kit = read_kit(target)
        model, tokenizer = load_kit(kit)
        self.stage = "tokenise"
        batches = self._batches(tokenizer)
        self.stage = "train"
        for batch in batches:
            _step(model, batch)
        self.stage = "return"
        save_return(self.place / "return", model, kit)
        self._plug(self.place / "return", kit, subject)

    def _return(self, target, subject):
        from siftune.cli import verify
        from siftune.offsite.kit.folder import read_kit

        path = self.sound / subject.partition(".")[0]
        kit = read_kit(path)
        self.stage = "verify"
        verify.run(verify.Options(target, kit=path))
        self._plug(target, kit, subject.partition(".")[0])

    def _plug(self, folder, kit, subject):
        from support.fuzz_kits import base_of

        from siftune.offsite.exchange.plug import plug_in
        from siftune.offsite.exchange.returned import open_return

        self.stage = "plug"
        base = base_of(subject)
        with open_return(folder, kit) as returned:
            plug_in(base, kit, [returned])
        assert all(bool(p.isfinite().all()) for p in base.parameters())

    def _batches(self, tokenizer):
        """With the chat template and without one."""
        from siftune.data.batches import Collator
        from siftune.data.read import load_rows
        from siftune.data.tokens import tokenize_rows

        rows = load_rows(str(self.rows))
        tables = [tokenize_rows(rows, tokenizer, 200, template) for template in ("auto", "none")]
        return [Collator(tokenizer.pad_token_id)(list(table)) for table in tables]


def _step(model, batch):
    """One step of plain descent; a loss or a weight that is no number is as bad as an exception."""
    import torch

    model.train()
    loss = model(**batch).loss
    loss.backward()
    assert loss.isfinite(), f"the loss is {float(loss)}"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                assert bool(parameter.grad.isfinite().all()), f"the gradient of {name} is not finite"
                parameter -= 1e-3 * parameter.grad / (1 + parameter.grad.norm())
                parameter.grad = None

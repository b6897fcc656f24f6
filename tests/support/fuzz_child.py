"""One mutation of a kit or a return, followed to the end, in a child process that may die of it."""

import contextlib
import dataclasses
import hashlib
import io
import json
import multiprocessing
import os
import shutil
import sys
import time
import traceback
import unicodedata
from datetime import datetime, timedelta
from pathlib import Path

# limits of the child: memory above what it has after its imports, and seconds for a mutation, of processor time and,
# for a machine with other work, on the clock
MEMORY_MB = 3000
SECONDS, CLOCK_SECONDS = 30, 240
LATER = timedelta(days=2000)  # between verification and the training of a case that waits for a date

PLAIN = (
    {"prompt": "2 + 3 is", "completion": " 5, or fünf"},
    {"prompt": "Say aa.", "completion": "aa\n"},
    {"prompt": "Do not forget the refund: is it true that the bank is not far?", "completion": "Yes, it is not."},
    {"prompt": "No. The answer is not known, I think.", "completion": "It is 42; ask the doctor."},
    {"prompt": "Naïve ﬁ ＡＢＣ Straße İ e\u0301", "completion": "№ Ω ½ 東京 é"},
    {"prompt": "def f(x):\n\treturn x  \n\n", "completion": "  two  spaces,\ta tab"},
    {"prompt": "a" * 120 + " word" * 31, "completion": "finis"},
)
_TALK = (
    [("system", "Be brief and do not lie."), ("user", "Is the sky blue?")],
    [("user", "How many legs has an ant?"), ("assistant", "It has six."), ("user", "And the spider?")],
)
CHATS = (
    *PLAIN,
    *({"prompt": [{"role": r, "content": c} for r, c in talk], "completion": "Yes, eight."} for talk in _TALK),
)
TRAINED = 4  # rows of a step
ROWS = {"auto": CHATS, "none": PLAIN}  # by the use of the chat template


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The end of a mutation.

    Attributes:
        end: One of `ENDS`.
        stage: Where that was.
        words: The sentence, the traceback, or what differs.
    """

    end: str
    stage: str = ""
    words: str = ""


ENDS = (
    "refused",  # by `verify`
    "rows refused",  # by the first look at the rows, before any training
    "harmless",  # rows, losses, return and plugged model are those of the sound folder, bit for bit
    "other numbers",  # all of it works; rows hold the same words, but something differs
    "altered rows",  # a row says something else than its owner wrote
    "breaks later",  # sound for `verify`, and refused after it
    "traceback",  # or a death of the process
    "hang",  # or more time than a mutation may take
)


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
            began, used = time.monotonic(), self._used()
            while time.monotonic() - began < CLOCK_SECONDS and self._used() - used < SECONDS:
                if self._pipe.poll(1):
                    return self._pipe.recv()
            outcome = Outcome("hang", "?", f"no end within {SECONDS} s")
        except EOFError:
            self._process.join()
            outcome = Outcome("traceback", "?", f"the process died with code {self._process.exitcode}")
        self.stop()
        return outcome

    def _used(self):
        """Seconds of processor time that the child has taken; 0 where only the clock is known."""
        stat = Path(f"/proc/{self._process.pid}/stat")
        if not stat.exists():
            return 0.0
        user, system = stat.read_text().rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def _start(self):
        context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
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


@dataclasses.dataclass
class Result:
    """What a mutation led to, in comparable form."""

    rows: dict = dataclasses.field(default_factory=dict)  # use of the template -> ids and labels of every row
    words: dict = dataclasses.field(default_factory=dict)  # the same -> decoded text of every row
    numbers: list = dataclasses.field(default_factory=list)  # losses, hashes of the return and of the plugged model

    def add(self, *tensors):
        """Hash tensors."""
        digest = hashlib.sha256()
        for tensor in tensors:
            digest.update(tensor.detach().contiguous().float().numpy().tobytes())
        self.numbers.append(digest.hexdigest())


class Route:
    """The way of a kit: verify, load, rows, one training step, return, plug; of a return: verify, plug.

    Args:
        folder: As for `Child`.
    """

    def __init__(self, folder):
        self.sound, self.place = folder, folder / f"child{os.getpid()}"
        self.stage, self.result, self._honest, self._bases = "", Result(), {}, {}
        self.rows = {}
        for template, rows in ROWS.items():
            self.rows[template] = folder / f"rows-{template}.jsonl"
            self.rows[template].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def follow(self, case):
        """Write a mutation down and follow it; compare its result with the sound folder's."""
        key = (case.subject, case.beside, case.key)
        if key not in self._honest:
            untouched = dataclasses.replace(case, files={}, what="nothing", later=False, swap=None)
            first = Outcome("refused") if case.beside else self._outcome(untouched)
            self._honest[key] = self.result if first.end == "harmless" else None
        outcome = self._outcome(case)
        honest = self._honest[key]
        if outcome.end != "harmless" or case.what == "nothing":
            return outcome
        if honest is None:
            return Outcome("other numbers", "plug", "both were counted")
        if case.swap and self._twin(case) == self.result:  # of the complete folder, before it was read
            return Outcome("harmless", "", "it is the twin now")
        return self._compared(honest)

    def _twin(self, case):
        """Result of the kit that files are swapped for."""
        if "twin" not in self._honest:
            now, outcome = self.result, self._outcome(dataclasses.replace(case, subject="twin", swap=None))
            assert outcome.end == "harmless", outcome
            self._honest["twin"], self.result = self.result, now
        return self._honest["twin"]

    def _outcome(self, case):
        from siftune.base.errors import InputError

        self.result, self._case = Result(), case
        shutil.rmtree(self.place, ignore_errors=True)
        target = shutil.copytree(self.sound / case.subject, self.place / "mutated")
        try:
            self._write(target, case)
            swapping = case.swap.begin(target, self.sound) if case.swap else contextlib.nullcontext()
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), swapping:
                (self._return if "return" in case.subject else self._kit)(target, case.subject)
        except InputError as error:
            return self._refusal(str(error))
        except (Exception, RecursionError, MemoryError):
            return Outcome("traceback", self.stage, traceback.format_exc())
        except BaseException as error:  # a panic in Rust is no Exception
            return Outcome("traceback", self.stage, f"{type(error)}: {error}")
        finally:
            shutil.rmtree(self.place, ignore_errors=True)
        return Outcome("harmless")

    def _write(self, target, case):
        from support.kits import repair

        for name, data in case.files.items():
            (target / name).unlink() if data is None else (target / name).write_bytes(data)
        if case.repaired:
            repair(target)

    def _refusal(self, words):
        plain = words.isprintable() and len(words) < 1500 + len(str(self.place))
        end = {"verify": "refused", "rows": "rows refused"}.get(self.stage, "breaks later") if plain else "traceback"
        return Outcome(end, self.stage, words.replace(str(self.place), ""))

    def _compared(self, honest):
        """The end of a mutation that works."""
        for template, texts in self.result.words.items():
            if self.result.rows[template] != honest.rows[template] and (fault := altered(texts, template)):
                return Outcome("altered rows", "rows", fault)
        if self.result.rows != honest.rows:
            return Outcome("other numbers", "rows", "the same words, in other tokens")
        if self.result.numbers != honest.numbers:
            return Outcome("other numbers", "train", "the same rows, but another model")
        return Outcome("harmless")

    def _kit(self, target, subject):
        from siftune.offsite.exchange.load import load_kit
        from siftune.offsite.exchange.tune import save_return
        from siftune.offsite.kit.folder import facts, read_kit

        key = self.sound / self._case.key if self._case.key else None
        self.stage = "verify"
        kit = read_kit(target, key)
        facts(kit)
        self.stage = "load"
        if self._case.swap:
            kit = read_kit(target, key)
        model, tokenizer = load_kit(kit)
        self.stage = "rows"
        batch = self._batch(tokenizer)
        self.stage = "train"
        self.result.add(_step(model, batch))
        self.stage = "return"
        save_return(self.place / "return", model, kit)
        self._plug([self.place / "return"], kit, subject)

    def _return(self, target, subject):
        from siftune.cli import verify
        from siftune.offsite.kit.folder import read_kit

        path = self.sound / subject.partition(".")[0]
        kit = read_kit(path)
        self.stage = "verify"
        verify.run(verify.Options(target, kit=path))
        self._plug([target, *(self.sound / name for name in self._case.beside)], kit, subject.partition(".")[0])

    def _plug(self, folders, kit, subject):
        from support.fuzz_kits import base_of

        from siftune.offsite.exchange.plug import plug_in
        from siftune.offsite.exchange.returned import open_return

        self.stage = "verify" if len(folders) > 1 else "plug"  # the owner sees several returns together only here
        if subject not in self._bases:
            base = base_of(subject)
            self._bases[subject] = base, {name: tensor.clone() for name, tensor in base.state_dict().items()}
        base, sound = self._bases[subject]
        base.load_state_dict(sound)
        with contextlib.ExitStack() as stack:
            plug_in(base, kit, [stack.enter_context(open_return(folder, kit)) for folder in folders])
        assert all(bool(p.isfinite().all()) for p in base.parameters())
        self.result.add(*base.parameters())

    def _batch(self, tokenizer):
        """Rows with the chat template and without one, and once more on a later day; the first few are trained on."""
        from siftune.data.batches import Collator
        from siftune.data.read import load_rows
        from siftune.data.tokens import tokenize_rows

        def tokenized(template):
            return list(tokenize_rows(load_rows(str(self.rows[template])), tokenizer, 500, template))

        for template in ROWS:
            rows = tokenized(template)
            if self._case.later:
                with _clock(datetime.now() + LATER):
                    rows += tokenized(template)
            ids = [row["input_ids"] for row in rows]
            decode = tokenizer.backend_tokenizer.decode
            self.result.rows[template] = [(row["input_ids"], row["labels"]) for row in rows]
            self.result.words[template] = [decode(row, skip_special_tokens=template == "none") for row in ids]
        return Collator(tokenizer.pad_token_id)(rows[:TRAINED])


def altered(texts, template):
    """What is wrong with rows as text; None where each has its words in order, and otherwise fixed text.

    Without a chat template only white space may be added.

    Args:
        texts: Decoded rows, those of `ROWS[template]` once or more.
        template: Use of the chat template.
    """
    fixed = {}
    for text, row in zip(texts, ROWS[template] * (len(texts) // len(ROWS[template])), strict=True):
        talk = row["prompt"] if isinstance(row["prompt"], list) else [{"role": "user", "content": row["prompt"]}]
        rest, gaps = unicodedata.normalize("NFC", text), []
        for content in (*(message["content"] for message in talk), row["completion"]):
            wanted = unicodedata.normalize("NFC", content.strip())
            before, found, rest = rest.partition(wanted)
            if not found:
                return f"{wanted[:40]!r} is not in {text[:200]!r}"
            gaps.append(before.strip())
        gaps.append(rest.strip())
        if template == "none" and any(gaps):
            return f"{gaps} stands around {text[:100]!r}"
        if fixed.setdefault(tuple(message["role"] for message in talk), gaps) != gaps:
            return f"{gaps} stands around {text[:100]!r}, and elsewhere something else"
    return None


@contextlib.contextmanager
def _clock(now):
    """Another time of day for chat templates."""
    from transformers.utils import chat_template_utils

    class Clock(datetime):
        @classmethod
        def now(cls, tz=None):
            return now

    old = chat_template_utils.datetime
    chat_template_utils.datetime = Clock
    try:
        yield
    finally:
        chat_template_utils.datetime = old


def _step(model, batch):
    """One step of plain descent, and its loss; one that is no number ends the run, as in `siftune train`."""
    import torch

    from siftune.base.errors import InputError

    model.train()
    torch.manual_seed(0)  # of dropouts
    loss = model(**batch).loss
    loss.backward()
    if not loss.isfinite():
        raise InputError(f"the loss is {float(loss)}")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                if not bool(parameter.grad.isfinite().all()):
                    raise InputError(f"the gradient of {name} is not finite")
                parameter -= 1e-3 * parameter.grad / (1 + parameter.grad.norm())
                parameter.grad = None
    return loss

"""GAST among recent rows (ours): rows are followed or not as they come, however small their batches are.

Each unit keeps a window of the scores of the last optimizer steps, on all ranks the same, in whose company a row is
judged (`maths.chances`), and a running sum of the chances, by which rows are drawn (`maths.systematic`). The window
moves between optimizer steps alone, and no order within a step is kept, so that a row's chance does not depend on how
the step was divided into micro-batches and ranks.

Shapes: S samples of a batch, N rows of a window, U units.
"""

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from siftune.engine.ranks import columns_of_ranks
from siftune.methods.drivers.sample_choice import Unit
from siftune.methods.gast import maths
from siftune.methods.gast.maths import Scored
from siftune.methods.gast.settings import GASTSettings

ROWS = 64  # a window holds the newest steps that have as many rows together
LEAST = 16  # rows in a window before rows are selected: a deviation of fewer says little


class Stream:
    """What the units of a model remember of rows that came; `select` of the settings is a share."""

    def __init__(self, settings: GASTSettings, units: Sequence[Unit]) -> None:
        self._settings = settings
        self._units = units
        self._windows: list[list[Tensor]] = [[] for _ in units]  # scores by step, float64 on the CPU, ascending
        self._recent: dict[int, Tensor] = {}  # the windows by place, where the scores are
        self._noted: list[list[Tensor]] = [[] for _ in units]  # this step's scores; NaN for rows that do not count
        self._sums: dict[int, Tensor] = {}  # this step's running sums by place

    def follow(self, unit: Unit, scored: Scored, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Choose of a batch's rows those that a unit follows, by its scores, (S,).

        `uniform`, (1,) in [0, 1), is where the running sum begins if this is the step's first batch.

        Returns:
            followed: (S,) bool.
            factor: Scalar, what their sum is multiplied by.
        """
        recent_N, one = self._window(unit.place, scored.scores), uniform.new_ones(())
        counted_S = self._note(unit.place, scored)
        if self._settings.needs_scores and len(recent_N) < LEAST:
            return torch.ones_like(scored.live), one
        chances_S = maths.chances(scored.scores.to(uniform.dtype), recent_N.to(uniform.dtype), self._settings)
        begun = self._sums.get(unit.place, (uniform * maths.TURN).long().squeeze(0))
        followed_S, self._sums[unit.place] = maths.systematic(chances_S.where(counted_S, 0.0), begun)
        return followed_S, one / float(self._settings.select)

    def end(self) -> None:
        """Take the step's rows, those of all ranks, into the windows, and let the next one begin its sums anew."""
        if self._settings.needs_scores:
            own_UR = pad_sequence(
                [torch.cat([torch.zeros(0), *(part.cpu() for part in parts)]).double() for parts in self._noted],
                batch_first=True,
                padding_value=torch.nan,
            )
            for window, scores_R in zip(self._windows, columns_of_ranks(own_UR, self._device()), strict=True):
                _move(window, scores_R[~scores_R.isnan()])
        self._noted = [[] for _ in self._units]
        self._recent.clear()
        self._sums.clear()

    def state_dict(self) -> dict[str, Any]:
        """JSON-ready state: the windows, and the running sums where a step has begun."""
        named = zip(self._units, self._windows, strict=True)
        return {
            "windows": {unit.name: [_text(step_R) for step_R in window] for unit, window in named},
            "sums": {str(place): int(value) for place, value in self._sums.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict()`; what it has not begins anew."""
        windows, sums = state.get("windows", {}), state.get("sums", {})
        self._windows = [[_scores(text) for text in windows.get(unit.name, [])] for unit in self._units]
        self._noted, self._recent = [[] for _ in self._units], {}
        self._sums = {int(place): torch.tensor(value, device=self._device()) for place, value in sums.items()}

    def _window(self, place: int, like: Tensor) -> Tensor:
        """A unit's window in this step, where its scores are; (N,)."""
        if place not in self._recent:
            window = torch.cat([torch.zeros(0, dtype=torch.float64), *self._windows[place]])
            self._recent[place] = window.to(like)
        return self._recent[place]

    def _note(self, place: int, scored: Scored) -> Tensor:
        """Keep a batch's scores for the window, and tell which of its rows can be followed; (S,) bool.

        A score of exactly zero is one against a support gradient of zero, as "momentum" has it at first: the row can be
        followed, but others are not to be compared with it.
        """
        counted_S = scored.live & torch.isfinite(scored.scores)
        if self._settings.needs_scores:
            self._noted[place].append(scored.scores.where(counted_S & (scored.scores != 0), torch.nan))
        return counted_S

    def _device(self) -> torch.device:
        return self._units[0].parameters[0].device


def _move(window: list[Tensor], fresh_R: Tensor) -> None:
    """Add a step to a window, and drop the oldest ones that it can do without."""
    if not len(fresh_R):
        return
    window.append(fresh_R.sort().values)
    while sum(map(len, window[1:])) >= ROWS:
        del window[0]


def _text(scores_R: Tensor) -> str:
    return base64.b64encode(scores_R.numpy().tobytes()).decode("ascii")


def _scores(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.float64)

"""What share of the rows from each source was followed, for methods that choose rows."""

from collections.abc import Sequence

from siftune.methods.drivers.sample_choice import SampleChoice


class Followed:
    """Counts over the batches of a run, on this rank, since it was resumed; `sources` says where each row is from."""

    def __init__(self, sources: Sequence[str]) -> None:
        self._sources = sources
        self._followed: dict[str, float] = {}
        self._seen: dict[str, int] = {}

    def note(self, choice: SampleChoice, rows: Sequence[int]) -> None:
        """Count the choice in a batch, whose rows have these numbers among the training rows."""
        for row in rows:
            self._seen[self._sources[row]] = self._seen.get(self._sources[row], 0) + 1
        for unit in choice.selected.tolist():
            for place in unit:
                if place < 0:  # where a layer followed fewer rows than another
                    continue
                source = self._sources[rows[place]]
                self._followed[source] = self._followed.get(source, 0.0) + 1 / len(choice.layers)

    def shares(self) -> dict[str, float]:
        """Source -> share of its rows that were followed, 0 to 1: the mean over layers; empty where nothing was chosen.

        Example:
            >>> followed, scores = Followed(["web", "books"]), torch.zeros(2, 2)
            >>> choice = SampleChoice(0, 0, ("a", "b"), (0, 1), scores, torch.tensor([[0], [1]]))
            >>> followed.note(choice, [0, 1])
            >>> followed.shares()
            {'books': 0.5, 'web': 0.5}
        """
        return {source: round(self._followed.get(source, 0.0) / self._seen[source], 4) for source in sorted(self._seen)}

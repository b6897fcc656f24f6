"""Selection among recent rows, written slowly and plainly: chances by bisection, a running sum, windows of steps."""

import itertools
import math


def chance_by_bisection(score, recent, share):
    """min(1, c exp(z)) of a row in the company of recent ones."""
    rows = [*recent, score]
    mean = math.fsum(rows) / len(rows)
    deviation = math.sqrt(math.fsum((row - mean) ** 2 for row in rows) / len(rows))
    around = deviation + 1e-5 * max(map(abs, rows))
    return last_by_bisection([(row - mean) / around if around else 0.0 for row in rows], share)


def last_by_bisection(logits, share):
    """min(1, c exp(logit)) of the last row, c found by halving: the mean over all of them is the share."""
    low, high = -max(logits) - 100.0, -min(logits) + 100.0
    for _ in range(200):
        middle = (low + high) / 2
        reached = math.fsum(math.exp(min(0.0, middle + logit)) for logit in logits) / len(logits)
        low, high = (middle, high) if reached < share else (low, middle)
    return math.exp(min(0.0, high + logits[-1]))


def top_chance_by_orders(score, recent, share):
    """Place the rows in every order that puts higher ones first; the mean of what of the row is within the share."""
    rows, found = [*enumerate(recent), (len(recent), score)], []
    for order in itertools.permutations(rows):
        if all(a[1] >= b[1] for a, b in itertools.pairwise(order)):
            place = order.index(rows[-1])
            found.append(min(1.0, max(0.0, share * len(rows) - place)))
    return math.fsum(found) / len(found)


def top_chance(score, recent, share):
    """The same by counting, for more rows than can be put into all orders."""
    above, equal = sum(r > score for r in recent), sum(r == score for r in recent)
    places = [min(1.0, max(0.0, share * (len(recent) + 1) - above - i)) for i in range(equal + 1)]
    return math.fsum(places) / len(places)


class SlowStream:
    """One unit's window and running sum."""

    def __init__(self, settings):
        self.settings, self.steps, self.step, self.total = settings, [], [], None

    def chance(self, score):
        recent, choice, share = [row for step in self.steps for row in step], self.settings.choice, self.settings.select
        if choice == "random":
            return share
        if choice == "topk":
            return top_chance(score, recent, share)
        return chance_by_bisection(score, recent, share)

    def follow(self, scores, live, uniform):
        """Which rows of a batch are followed, their chances (None: all are followed), and the factor."""
        ready = self.settings.choice == "random" or sum(map(len, self.steps)) >= 16
        chances = [self.chance(s) if there else 0.0 for s, there in zip(scores, live, strict=True)] if ready else None
        self.step += [s for s, there in zip(scores, live, strict=True) if there and s != 0]
        if chances is None:
            return list(range(len(scores))), None, 1.0
        self.total = uniform if self.total is None else self.total
        chosen = []
        for row, chance in enumerate(chances):
            if math.floor(self.total + chance) > math.floor(self.total):
                chosen.append(row)
            self.total += chance
        return chosen, chances, 1 / self.settings.select

    def end(self):
        if self.step:
            self.steps.append(self.step)
        while sum(map(len, self.steps[1:])) >= 64:
            self.steps.pop(0)
        self.step, self.total = [], None

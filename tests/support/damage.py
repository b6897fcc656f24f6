"""Changes of JSON: every value, key and item, for tests of damaged files."""

import copy
import json

NESTED, NAN = "@nested@", "@nan@"  # a test replaces them in the text, since no writer would write them
JUNK = (None, True, -1, 0, 10**9, 10**30, 1.5, NAN, "", "../x", "/etc/passwd\0", [], {}, [[]], {"a": 1}, NESTED)


def places(value, path=()):
    """Paths of every value in a tree of JSON."""
    yield path
    for key, child in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(child, (*path, key))


def at(value, path):
    for key in path:
        value = value[key]
    return value


def with_value(whole, path, new):
    """A tree with one value replaced."""
    if not path:
        return new
    whole = copy.deepcopy(whole)
    at(whole, path[:-1])[path[-1]] = new
    return whole


def mutations(whole):
    """Every value replaced, every key removed or renamed, one added to every object, items to and from every list.

    Args:
        whole: A tree of JSON.

    Yields:
        What was done, and the tree.
    """
    for path in places(whole):
        old = at(whole, path)
        for new in JUNK:
            if json.dumps(new) != json.dumps(old):
                yield f"{path} = {new!r}", with_value(whole, path, new)
        if isinstance(old, dict):
            yield f"{path} more", with_value(whole, path, {**old, "x": 1})
        if isinstance(old, list):
            yield f"{path} longer", with_value(whole, path, [*old, *(old or [1])])
            yield from [(f"{path} shorter", with_value(whole, path, old[:-1]))] * bool(old)
        if path and isinstance(path[-1], str):
            parent = {key: child for key, child in at(whole, path[:-1]).items() if key != path[-1]}
            yield f"{path} gone", with_value(whole, path[:-1], parent)
            yield f"{path} renamed", with_value(whole, path[:-1], {**parent, path[-1] + "_": old})

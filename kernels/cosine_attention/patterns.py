"""Which keys a row may see: the four patterns that the models attend with."""

from dataclasses import dataclass
from typing import TypeAlias

KINDS = ("full", "causal", "query_causal", "query_inference")
POKE_KINDS = ("query_causal", "query_inference")


@dataclass(frozen=True)
class AttentionPattern:
    """Row r sees the keys with index < limit(r) and, unless the pattern is full, itself.

    The sequence of the two query patterns is P pokes, then queries; pokes never see queries, and queries never see
    one another.

    - full: every row sees every key; queries and keys may differ in number.
    - causal: limit(r) = r.
    - query_causal (training): limit(r) = r for pokes. Behind them come P groups of n queries, and group g sees the
      pokes before poke g: limit(r) = (r - P) // n.
    - query_inference: limit(r) = r for pokes and P for queries.
    """

    kind: str
    """One of `KINDS`."""
    num_pokes: int = 0
    """P, the length of the poke prefix; only for the two query patterns."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"pattern {self.kind!r} is not one of {', '.join(map(repr, KINDS))}")
        if self.kind not in POKE_KINDS and self.num_pokes != 0:
            raise ValueError(f"pattern {self.kind!r} has no poke prefix, but num_pokes={self.num_pokes}; leave it out")
        least = 1 if self.kind == "query_causal" else 0
        if self.num_pokes < least:
            raise ValueError(
                f"pattern {self.kind!r} has num_pokes={self.num_pokes} and needs at least {least}; "
                f"write ({self.kind!r}, P) with P the number of pokes at the front of the sequence"
            )

    def check(self, num_rows: int, num_keys: int) -> None:
        """Raises: ValueError if sequences of these lengths do not have this pattern."""
        if self.kind != "full" and num_rows != num_keys:
            raise ValueError(
                f"pattern {self.kind!r} needs as many keys as rows, not {num_keys} keys for {num_rows} rows; "
                "only 'full' attends across sequences"
            )
        if self.num_pokes > num_rows:
            raise ValueError(f"a sequence of {num_rows} cannot begin with num_pokes={self.num_pokes} pokes")
        if self.kind == "query_causal" and (num_rows - self.num_pokes) % self.num_pokes != 0:
            raise ValueError(
                f"{num_rows - self.num_pokes} queries cannot be shared out over num_pokes={self.num_pokes} groups: "
                "query_causal needs a sequence of P pokes and P * n queries"
            )

    def queries_per_poke(self, num_rows: int) -> int:
        """n of query_causal: queries in each group."""
        return (num_rows - self.num_pokes) // self.num_pokes


PatternLike: TypeAlias = AttentionPattern | str | tuple[str, int]


def as_pattern(pattern: PatternLike) -> AttentionPattern:
    """An `AttentionPattern` from itself, from "full" or "causal", or from ("query-causal", P), ("query-inference", P).

    Raises: ValueError for a name that is not known, or a poke count that does not belong to it.
    """
    if isinstance(pattern, AttentionPattern):
        return pattern
    name, num_pokes = (pattern, 0) if isinstance(pattern, str) else pattern
    return AttentionPattern(name.replace("-", "_"), num_pokes)

"""The manifest of a student's teachers: which they are, and how many tokens each has scored."""

from collections import Counter
from collections.abc import Sequence

from accelerate.utils import gather_object

from poweropd.config import Config
from poweropd.config.teachers import TeacherConfig
from poweropd.data.rollout import Example
from poweropd.models import fingerprints
from poweropd.runs.files import JsonObject


class TeacherManifest:
    """Counts the tokens that each teacher of a run scores in this process.

    `is_main` says whether this process writes the manifest; others know no fingerprints.
    """

    def __init__(self, config: Config, is_main: bool = True) -> None:
        self.is_main, self.mixed = is_main, config.mixes_teachers
        self.entries = {name: _entry(one, is_main) for name, one in config.teachers.items()}
        self.tokens = Counter[str]()

    def count(self, examples: Sequence[Example]) -> None:
        """Counts the tokens of scored examples; all teachers of a mixture score all of them."""
        for example in examples:
            for name in self.entries if self.mixed else (example.prompt.domain,):
                self.tokens[name] += example.num_tokens

    def rows(self) -> list[JsonObject]:
        """Returns one row for each teacher, as JSON; all processes call it.

        A row has name (null of a single teacher), model, servers, fingerprint of the weights (null
        on servers), weight, and tokens, which are those of all processes since the first step.
        """
        total = sum(gather_object([self.tokens]), Counter[str]())
        return [
            {"name": name or None, **entry, "tokens": total[name]}
            for name, entry in self.entries.items()
        ]

    def restore(self, rows: Sequence[JsonObject]) -> None:
        """Takes up the counts of a checkpoint's rows."""
        if self.is_main:  # once for all processes
            self.tokens = Counter({row["name"] or "": row["tokens"] for row in rows})


def _entry(section: TeacherConfig, is_main: bool) -> JsonObject:
    """Returns what of a teacher's row stays the same over a run."""
    known = is_main and not section.servers
    return {
        "model": section.model,
        "servers": section.servers,
        "fingerprint": fingerprints.of_weights(section.model) if known else None,
        "weight": section.weight,
    }

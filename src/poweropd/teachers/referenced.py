"""A reward's reference model, which scores every example beside the teacher."""

from dataclasses import replace

from poweropd.data.rollout import Example
from poweropd.teachers.base import TeacherScorer


class Referenced:
    """Scores with a teacher, and with a reference model that reads what the student reads."""

    def __init__(self, teacher: TeacherScorer, reference: TeacherScorer) -> None:
        self.teacher, self.reference = teacher, reference

    def submit(self, example: Example) -> None:
        self.teacher.submit(example)
        self.reference.submit(as_the_student_reads(example))

    def collect(self) -> list[Example]:
        """Returns the teacher's examples; each has its `reference_log_probs`, too."""
        pairs = zip(self.teacher.collect(), self.reference.collect(), strict=True)
        return [replace(e, reference_log_probs=own.teacher_log_probs) for e, own in pairs]


def as_the_student_reads(example: Example) -> Example:
    """Returns the example with the student's prompt and targets for the teacher."""
    rollout, request = example.rollout, example.rollout.request
    prompt = replace(request.prompt, teacher_prompt_ids=request.prompt_ids)
    own = replace(rollout, request=replace(request, prompt=prompt))
    return replace(example, rollout=own, teacher_targets=example.student_targets)

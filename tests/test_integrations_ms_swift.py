"""ms-swift with our plugin: a whole training, under its own pins (make integrations-ms-swift).

Beside the other trainers, whose pins do not fit, the plugin alone is tested.
"""

import importlib
import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from poweropd import evaluate
from poweropd.embedded import path, task

pytestmark = [pytest.mark.integrations, pytest.mark.filterwarnings("ignore")]
SETTINGS = {
    **{"rlhf_type": "grpo", "teacher_kl_coef": 1, "beta": 0, "num_generations": 4},
    **{"model_type": "qwen3", "teacher_model_type": "qwen3", "torch_dtype": "float32"},
    # The embedded pair's own template, whose turns are those of ChatML without a system's.
    **{"template": "chatml", "system": ""},
    **{"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_completion_length": 64},
    **{"tuner_type": "full", "use_vllm": "false", "report_to": "none"},
    **{"per_device_train_batch_size": 16, "max_steps": 60, "learning_rate": 5e-5},
    **{"lr_scheduler_type": "constant", "warmup_ratio": 0, "dataloader_num_workers": 0},
    **{"save_steps": 60, "save_only_model": "true", "load_from_cache_file": "false"},
}


def pins_of_ms_swift_hold() -> bool:
    """Whether this environment was made for ms-swift: it trains with TRL below 1.0 alone."""
    try:
        return version("ms-swift") != "" and int(version("trl").split(".")[0]) < 1
    except PackageNotFoundError:
        return False


def test_ms_swift_imports_the_plugin_as_it_imports_any() -> None:
    pytest.importorskip("swift", reason="ms-swift is not installed")
    advantage = importlib.import_module("swift.rl_core.advantage")
    from swift.utils.utils import import_external_file

    from poweropd.integrations import ms_swift

    import_external_file(ms_swift.__file__)
    assert advantage.compute_teacher_logratio.__name__ == "teacher_reward"


@pytest.mark.skipif(not pins_of_ms_swift_hold(), reason="see `make integrations-ms-swift`")
def test_a_whole_training_by_ms_swift_makes_the_student_better(tmp_path: Path) -> None:
    plugin = Path(__file__).parent.parent / "src/poweropd/integrations/ms_swift.py"
    rows = [
        {"messages": [{"role": "user", "content": p.problem}], "solution": p.answer}
        for p in task.problems("train", 512)
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = SETTINGS | {
        **{"model": path("student"), "teacher_model": path("teacher")},
        **{"external_plugins": plugin, "dataset": tmp_path / "train.jsonl"},
        "output_dir": tmp_path / "out",
    }
    options = [text for name, value in given.items() for text in (f"--{name}", str(value))]
    done = subprocess.run(
        [sys.executable, "-m", "swift.cli.main", "rlhf", *options],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (trained,) = (tmp_path / "out").glob("*/checkpoint-60")
    before, after = (
        evaluate(str(model), ["embedded"], n=1, limit=512, max_new_tokens=64, dtype="float32")[
            "embedded"
        ].avg_at_k
        for model in ("embedded:student", trained)
    )
    assert after.low > before.high

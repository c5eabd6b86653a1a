"""Every key of a recipe has a test that proves what it does; a new key needs a line here."""

import ast
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel
from test_keys_scores import FORMULAS

from poweropd import rewards
from poweropd.config import Config

TESTS = Path(__file__).parent

BENCHMARKS = "graders::benchmarks_of_a_recipe_have_columns_graders_and_numbers_of_their_own"

SCHEDULE = ("schedule", "start", "end", "steps")
STEP_LENGTHS = "schedules::a_step_is_as_long_as_its_schedule_says"
STEP_TEMPERATURES = "schedules::a_step_is_sampled_at_its_temperature"
TOOLS = "turns_tools::a_training_with_tools_loses_nothing_and_tells_of_errors"
ENVIRONMENT = "turns::conversations_with_an_environment_train_and_resume_to_the_last_bit"

# Key -> the test that fails if the code ignores the key, as "file::function" without "test_".
PROOFS = {
    "run.dir": "keys::a_run_is_kept_in_its_directory",
    "model.student": "keys::the_student_is_the_named_one",
    "model.dtype": "keys::the_student_is_exported_in_its_dtype",
    "model.master_dtype": "keys::weights_and_optimizer_are_kept_in_the_master_dtype",
    "model.lora.r": "keys::lora_has_its_rank_scale_and_targets",
    "model.lora.alpha": "keys::lora_has_its_rank_scale_and_targets",
    "model.lora.target_modules": "keys::lora_has_its_rank_scale_and_targets",
    "model.lora.merge": "trainer::lora_trains_the_adapter_alone_and_can_be_merged",
    "model.gradient_checkpointing": (
        "trainer::gradient_checkpointing_recomputes_and_changes_nothing"
    ),
    "model.attention": "keys::student_and_teacher_attend_as_said",
    "model.compile": "attention::compiled_layers_give_the_same_gradient",
    "model.trust_remote_code": "keys::code_of_a_repository_runs_only_where_it_is_trusted",
    "teacher.model": "keys_scores::the_teacher_is_the_named_one",
    "teacher.trust_remote_code": "keys::code_of_a_repository_runs_only_where_it_is_trusted",
    "teacher.dtype": "keys_scores::a_teacher_computes_in_its_dtype",
    "teacher.max_tokens_per_batch": "keys_scores::a_teacher_reads_so_many_tokens_at_once",
    "teacher.quantization": "keys_scores::a_quantized_teacher_scores_and_is_measured_if_asked_for",
    "teacher.measure_quantization": (
        "keys_scores::a_quantized_teacher_scores_and_is_measured_if_asked_for"
    ),
    "teacher.align": "teachers_spans::the_gradient_is_that_of_the_textbook_loss",
    "teacher.offload": "keys_scores::an_offloaded_teacher_is_on_the_device_only_while_it_scores",
    "teacher.servers": "teachers_server::a_completion_is_scored_while_others_are_sampled",
    "teacher.server_type": "teachers_top_k::every_kind_of_server_gives_the_models_log_probs",
    "teacher.tokenizer": "keys_scores::a_request_to_a_teacher_has_so_much_time",
    "teacher.api_key_env": "teachers_server::the_key_is_sent_and_appears_nowhere",
    "teacher.timeout": "keys_scores::a_request_to_a_teacher_has_so_much_time",
    "teacher.concurrency": (
        "teachers_server::requests_go_to_the_least_loaded_server_within_bounds"
    ),
    "teacher.patience": "teachers_server::answers_that_stay_wrong_end_the_run_and_none_is_used",
    "teacher.self": "self_teacher::the_base_is_the_model_that_the_adapter_was_added_to",
    "teacher.ema_decay": "self_teacher::the_average_follows_every_optimizer_step",
    "teacher.by": "teachers_routed::each_prompt_is_scored_by_its_own_teacher",
    "teacher.mix": (
        "teachers_mixture::a_run_is_scored_by_its_mixture_which_of_equal_teachers_is_one"
    ),
    "teacher.weight": "teachers_mixture::a_teachers_weight_is_a_factor_of_its_tokens_loss",
    "data.config": "keys_data::prompts_are_of_the_config_and_revision",
    "data.revision": "keys_data::prompts_are_of_the_config_and_revision",
    "data.continue_assistant": "messages::an_answer_at_the_end_is_left_out_or_continued",
    "data.filter_longer": "keys_data::prompts_that_are_too_long_are_left_out_if_asked_for",
    "data.limit": "messages::a_limit_reads_no_further_rows",
    "data.system_column": "messages::a_rows_own_system_turn_comes_before_the_recipes",
    "data.tools_column": "messages::tools_reach_the_template",
    "train.epochs": "keys::epochs_stand_for_the_steps_that_they_take",
    "evaluate.before": ("keys_data::the_student_is_evaluated_before_the_first_step_if_asked_for"),
    "evaluate.teacher": "teacher_evaluation::it_is_measured_once_in_a_run",
    "evaluate.benchmarks.revision": "keys_data::a_benchmark_is_of_its_revision",
    "evaluate.divergence.prompts": "divergence_training::a_file_of_prompts_beside_benchmarks",
    "evaluate.divergence.n": "divergence_training::a_file_of_prompts_beside_benchmarks",
    "evaluate.divergence.limit": "divergence_training::a_file_of_prompts_beside_benchmarks",
    "evaluate.divergence.max_new_tokens": (
        "divergence_training::a_file_of_prompts_beside_benchmarks"
    ),
    "evaluate.divergence.temperature": (
        "keys_data::completions_of_the_divergence_are_sampled_at_its_temperature"
    ),
    "data.prompts": "keys::column_system_and_chat_make_the_prompt",
    "data.split": "keys::a_hub_dataset_is_read_in_its_split",
    "data.column": "keys::column_system_and_chat_make_the_prompt",
    "data.teacher_column": "trainer::the_teacher_may_see_another_prompt",
    "data.teacher_prompt.role": (
        "teacher_prompts::messages_are_templates_and_a_last_one_of_the_assistant_is_gone_on_with"
    ),
    "data.teacher_prompt.content": (
        "teacher_prompts::messages_are_templates_and_a_last_one_of_the_assistant_is_gone_on_with"
    ),
    "data.teacher_system": "teacher_prompts::the_teachers_system_turn_replaces_any_other",
    "data.feedback.grader": "teacher_prompts::the_teacher_is_told_the_completion_and_its_grade",
    "data.feedback.answer_column": (
        "teacher_prompts::the_teacher_is_told_the_completion_and_its_grade"
    ),
    "data.chat": "keys::column_system_and_chat_make_the_prompt",
    "data.system": "keys::column_system_and_chat_make_the_prompt",
    "data.shuffle": "keys::prompts_come_in_the_order_that_the_recipe_says",
    "data.holdout": "keys::held_out_prompts_are_kept_out_of_training_and_stay_the_same",
    "rollout.engine": (
        "rollouts_engines::the_engine_of_the_docs_trains_on_the_students_tokens_alone"
    ),
    **{f"rollout.max_new_tokens.{key}": STEP_LENGTHS for key in SCHEDULE},
    **{f"rollout.temperature.{key}": STEP_TEMPERATURES for key in SCHEDULE},
    "rollout.top_p": "keys::temperature_and_truncation_change_what_is_sampled",
    "rollout.top_k": "keys::temperature_and_truncation_change_what_is_sampled",
    "rollout.per_prompt": "keys::so_many_prompts_and_completions_make_a_step",
    "rollout.batch_size": "keys::so_many_completions_are_sampled_at_once",
    "rollout.correction": "sampler::the_correction_weights_the_gradient",
    "rollout.score": "keys_scores::truncated_scores_are_over_what_sampling_keeps",
    "rollout.vllm.gpu_memory_utilization": "keys_engines::vllm_is_started_as_said",
    "rollout.vllm.max_model_len": "keys_engines::vllm_is_started_as_said",
    "rollout.vllm.enforce_eager": "keys_engines::vllm_is_started_as_said",
    "rollout.server.url": "keys_engines::the_server_and_its_weights_are_where_it_is_said",
    "rollout.server.weights_dir": "keys_engines::the_server_and_its_weights_are_where_it_is_said",
    "rollout.server.concurrency": "keys_engines::a_server_is_asked_for_so_many_completions_at_once",
    "rollout.server.timeout": (
        "keys_engines::a_completion_has_so_much_time_and_the_server_so_much_patience"
    ),
    "rollout.server.patience": (
        "keys_engines::a_completion_has_so_much_time_and_the_server_so_much_patience"
    ),
    "rollout.server.api_key_env": "keys_engines::the_key_of_the_server_is_sent",
    "rollout.verify_every": "keys_engines::weights_are_compared_so_often",
    "rollout.staleness": (
        "rollouts_engines::ahead_every_step_is_sampled_by_weights_of_so_many_steps_before"
    ),
    "rollout.off_policy.file": "off_policy::prompts_are_found_by_their_row_or_by_what_they_say",
    "rollout.off_policy.share": "off_policy::which_completions_are_given_is_a_function_of_the_step",
    "rollout.off_policy.weights": "off_policy::weights_are_in_the_gradient_and_in_the_metrics",
    "rollout.task_reward.name": "rollouts_engines::the_grader_is_a_task_reward",
    "rollout.task_reward.weight": "rollouts_engines::the_grader_is_a_task_reward",
    "rollout.task_reward.answer_column": "graders::any_grader_is_a_task_reward",
    "rollout.tools": TOOLS,
    "rollout.tool_format": "turns_calls::a_template_without_calls_needs_the_name_of_their_form",
    "rollout.tool_timeout": TOOLS,
    "rollout.tool_max_chars": TOOLS,
    "rollout.tool_workers": "turns_tools::tools_run_in_so_many_processes",
    "rollout.environment": ENVIRONMENT,
    "rollout.max_turns": ENVIRONMENT,
    "reward.name": "keys_scores::the_reward_and_its_parameters_are_those_of_the_recipe",
    "reference.model": "reference::the_reference_is_the_named_one",
    "reference.trust_remote_code": "keys::code_of_a_repository_runs_only_where_it_is_trusted",
    "reference.dtype": "reference::the_reference_computes_as_said",
    "reference.max_tokens_per_batch": "reference::the_reference_computes_as_said",
    "reference.offload": "reference::the_reference_computes_as_said",
    "objective.kind": "keys_scores::only_a_sampled_objective_depends_on_the_sampled_token",
    "objective.stop": "keys_scores::the_stop_is_trained_by_its_policy",
    "objective.top_k": "keys_scores::so_many_tokens_are_summed_over",
    "objective.teacher_top_k": (
        "teachers_top_k::the_teachers_most_probable_tokens_are_summed_over"
    ),
    "objective.baseline": "keys_scores::the_baseline_is_the_expected_reward",
    "objective.select.name": "keys_scores::tokens_are_selected_as_said",
    "objective.select.keep": "keys_scores::tokens_are_selected_as_said",
    "objective.select.beta": "keys_scores::tokens_are_selected_as_said",
    "objective.select.top_k": "keys_scores::tokens_are_selected_as_said",
    "objective.weights.name": "keys_scores::tokens_are_weighted_as_said",
    "objective.weights.gamma": "keys_scores::tokens_are_weighted_as_said",
    "train.steps": "keys::the_learning_rate_follows_its_schedule_and_warm_up",
    "train.prompts_per_step": "keys::so_many_prompts_and_completions_make_a_step",
    "train.max_tokens_per_batch": "keys::a_micro_batch_keeps_to_its_tokens",
    "train.packing": "keys::a_micro_batch_is_laid_out_as_said",
    "train.sharding": "sharding::the_gradient_is_that_of_one_process",
    "train.learning_rate": "keys::the_learning_rate_follows_its_schedule_and_warm_up",
    "train.schedule": "keys::the_learning_rate_follows_its_schedule_and_warm_up",
    "train.warmup_steps": "keys::the_learning_rate_follows_its_schedule_and_warm_up",
    "train.weight_decay": "keys::weight_decay_pulls_towards_zero",
    "train.clip_grad_norm": "keys::clipping_bounds_the_gradient_that_trains",
    "train.seed": "keys::the_seed_decides_prompts_and_completions",
    "evaluate.every": "runner::evaluation_during_training_keeps_the_best_student",
    "evaluate.benchmarks.name": BENCHMARKS,
    "evaluate.benchmarks.file": BENCHMARKS,
    "evaluate.benchmarks.dataset": "keys_engines::a_benchmark_of_the_hub_is_the_described_one",
    "evaluate.benchmarks.config": "keys_engines::a_benchmark_of_the_hub_is_the_described_one",
    "evaluate.benchmarks.split": "keys_engines::a_benchmark_of_the_hub_is_the_described_one",
    "evaluate.benchmarks.problem": BENCHMARKS,
    "evaluate.benchmarks.answer": BENCHMARKS,
    "evaluate.benchmarks.instruction": BENCHMARKS,
    "evaluate.benchmarks.grader": BENCHMARKS,
    "evaluate.benchmarks.n": BENCHMARKS,
    "evaluate.benchmarks.limit": "keys_engines::a_benchmark_of_the_hub_is_the_described_one",
    "evaluate.grader": "keys_engines::completions_are_graded_as_said",
    "evaluate.n": "keys_engines::problems_and_completions_of_an_evaluation",
    "evaluate.limit": "keys_engines::problems_and_completions_of_an_evaluation",
    "evaluate.data_dir": "keys_engines::problems_and_completions_of_an_evaluation",
    "evaluate.max_new_tokens": "keys_engines::problems_and_completions_of_an_evaluation",
    "evaluate.temperature": "keys_engines::an_evaluation_samples_as_said",
    "evaluate.top_p": "keys_engines::an_evaluation_samples_as_said",
    "evaluate.top_k": "keys_engines::an_evaluation_samples_as_said",
    "evaluate.best": "keys_engines::the_best_student_is_that_of_the_named_metric",
    "checkpoint.every": "keys::checkpoints_are_written_and_kept_as_often_as_said",
    "checkpoint.keep": "keys::checkpoints_are_written_and_kept_as_often_as_said",
    "log.trackers": "trackers::a_tracker_has_the_numbers_of_the_metrics_and_stays_at_home",
}


def sections_of(annotation: Any) -> Iterator[type[BaseModel]]:
    """The sections that a field of this type may hold."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from sections_of(part)


def keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        inner = [key for s in sections_of(field.annotation) for key in keys(s, f"{prefix}{name}.")]
        yield from inner or [f"{prefix}{name}"]


def test_every_key_has_a_test_of_what_it_does() -> None:
    assert set(keys(Config)) == set(PROOFS)


@pytest.mark.parametrize("proof", sorted(set(PROOFS.values())))
def test_the_tests_of_the_table_are_there(proof: str) -> None:
    file, name = proof.split("::")
    tree = ast.parse((TESTS / f"test_{file}.py").read_text())
    assert f"test_{name}" in {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}


def test_every_parameter_of_a_reward_has_a_test_of_what_it_does() -> None:
    expected = {
        f"{name}.{field.name}"
        for name, kind in rewards.REWARDS.items()
        for field in dataclasses.fields(kind)
    }
    assert {key for key in FORMULAS if "." in key} == expected
    assert {key.partition(".")[0] for key in FORMULAS} == set(rewards.REWARDS)

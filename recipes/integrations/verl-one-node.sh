#!/usr/bin/env bash
# PowerOPD in verl on one node: pip install poweropd verl, then run this.
#
# STUDENT and TEACHER share one vocabulary. TRAIN and TEST are verl's Parquet files, with the columns
# prompt, data_source and reward_model. GPUS train and sample; TEACHER_GPUS hold the teacher.
# Further overrides follow as arguments.
set -euo pipefail

STUDENT=${STUDENT:-Qwen/Qwen3-0.6B}
TEACHER=${TEACHER:-Qwen/Qwen3-4B}
TRAIN=${TRAIN:?the Parquet file of the training prompts}
TEST=${TEST:?the Parquet file of the test prompts}
GPUS=${GPUS:-4}
TEACHER_GPUS=${TEACHER_GPUS:-4}

overrides=(
    data.train_files="$TRAIN" data.val_files="$TEST"
    data.train_batch_size=128 data.max_prompt_length=1024 data.max_response_length=2048
    actor_rollout_ref.model.path="$STUDENT"

    # The reward: poweropd (alpha 5, or POWEROPD_REWARD), poweropd_a0.5 to poweropd_a500,
    # poweropd_clip, poweropd_tanh or, to compare, poweropd_log_ratio.
    distillation.enabled=true
    distillation.distillation_loss.loss_mode="${LOSS_MODE:-poweropd}"
    distillation.distillation_loss.use_policy_gradient=true
    distillation.distillation_loss.use_task_rewards=false

    # The teacher, on GPUs of its own.
    distillation.nnodes=1 distillation.n_gpus_per_node="$TEACHER_GPUS"
    distillation.teacher_models.teacher_model.model_path="$TEACHER"
    distillation.teacher_models.teacher_model.inference.tensor_model_parallel_size=1

    # The teacher's log-probs are at temperature 1, so completions must be, too.
    actor_rollout_ref.rollout.name=vllm
    actor_rollout_ref.rollout.temperature=1.0 actor_rollout_ref.rollout.top_p=1.0
    actor_rollout_ref.rollout.top_k=-1 actor_rollout_ref.rollout.n=1
    actor_rollout_ref.rollout.tensor_model_parallel_size=1

    # One update per batch, so that the PPO ratio is one; every token of the batch weighs the same.
    actor_rollout_ref.actor.ppo_mini_batch_size=128 actor_rollout_ref.actor.ppo_epochs=1
    actor_rollout_ref.actor.loss_agg_mode=token-mean
    actor_rollout_ref.actor.use_kl_loss=false actor_rollout_ref.actor.entropy_coeff=0
    actor_rollout_ref.actor.use_dynamic_bsz=true
    actor_rollout_ref.actor.ppo_max_token_len_per_gpu=16384
    actor_rollout_ref.actor.optim.lr=1e-6

    trainer.nnodes=1 trainer.n_gpus_per_node="$GPUS"
    trainer.total_epochs=1 trainer.save_freq=100 trainer.test_freq=50
    trainer.project_name=poweropd trainer.experiment_name="${LOSS_MODE:-poweropd}"
    trainer.logger='["console"]'
)
exec python -m verl.trainer.main_ppo "${overrides[@]}" "$@"

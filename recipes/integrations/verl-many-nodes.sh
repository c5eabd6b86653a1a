#!/usr/bin/env bash
# PowerOPD in verl on many nodes. On the first node, start Ray, run this, and on every other node join:
#
#     ray start --head --port 6379                  # the first
#     ray start --address FIRST_NODE:6379           # every other, with poweropd installed, too
#
# NODES train and sample; TEACHER_NODES more hold the teacher. Each has GPUS GPUs. A reward in
# POWEROPD_REWARD is handed to the workers of all nodes.
set -euo pipefail

NODES=${NODES:-2}
TEACHER_NODES=${TEACHER_NODES:-1}
export GPUS=${GPUS:-8}
export TEACHER_GPUS=$GPUS

overrides=(
    trainer.nnodes="$NODES"
    distillation.nnodes="$TEACHER_NODES"
    actor_rollout_ref.actor.fsdp_config.strategy=fsdp2
)
if [[ -n "${POWEROPD_REWARD:-}" ]]; then
    quoted=${POWEROPD_REWARD//\"/\\\"}
    overrides+=("+ray_kwargs.ray_init.runtime_env.env_vars.POWEROPD_REWARD=\"$quoted\"")
fi
exec "$(dirname "$0")/verl-one-node.sh" "${overrides[@]}" "$@"

# The batch script's part of a job: numbering its lives, and queueing the job again when a life ends early.
# Sourced by the scripts that torchrl-sql submits and by slurm/*.sh. Needs bash and scontrol, no Python.

# torchrl_sql_begin STAGE SUBMISSION TASK...: which task of a stage this job works on; of an array, this element.
torchrl_sql_begin() {
  local tasks=("${@:3}") element=0
  torchrl_sql_submission=$2
  # The id of an array means all of its elements: requeueing it would start the finished ones again.
  torchrl_sql_job=$SLURM_JOB_ID
  if [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then torchrl_sql_job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID; fi
  if [ ${#tasks[@]} -gt 1 ]; then element=$SLURM_ARRAY_TASK_ID; fi
  torchrl_sql_task=$1/task_${tasks[$element]}
  export TORCHRL_SQL_LIFE=$2.${SLURM_RESTART_COUNT:-0}
}

# torchrl_sql_main KIND ARGUMENT...: a whole job from a batch script of a user's own, see slurm/.
torchrl_sql_main() {
  local stage python=${TORCHRL_SQL_PYTHON:-python}
  stage=$($python -m torchrl_sql.launch.prepare "$@") || exit 1
  torchrl_sql_begin "$stage" 0 0
  echo "$(date '+%F %T') job $torchrl_sql_job works in $stage"
  srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --open-mode=append --unbuffered \
    --output="$stage/${torchrl_sql_job}_%t_log.out" \
    env --block-signal=USR2 $python -m torchrl_sql.launch.job "$stage" 0
  torchrl_sql_end $?
}

torchrl_sql_say() { echo "$(date '+%F %T') job $torchrl_sql_job, life $TORCHRL_SQL_LIFE: $*"; }

# torchrl_sql_holds FILE TEXT: whether a file of the task holds just this text.
torchrl_sql_holds() { [ "$(cat "$torchrl_sql_task/$1" 2>/dev/null)" = "$2" ]; }

# torchrl_sql_end CODE: ends this life after its processes ended with CODE; the last command of a batch script.
torchrl_sql_end() {
  local code=$1 newest how count
  if [ -e "$torchrl_sql_task/done" ]; then torchrl_sql_say "done"; exit 0; fi
  if [ "$code" = 0 ]; then code=1; fi
  if [ -e "$torchrl_sql_task/FATAL" ]; then
    torchrl_sql_say "not retried: $(cat "$torchrl_sql_task/FATAL")"
    exit "$code"
  fi
  if torchrl_sql_holds cancelled "$torchrl_sql_submission"; then torchrl_sql_say "cancelled"; exit "$code"; fi
  if torchrl_sql_holds stopped "$TORCHRL_SQL_LIFE"; then
    torchrl_sql_say "stopped; torchrl-sql resume continues it"
    exit "$code"
  fi
  how="exit code $code"
  if torchrl_sql_holds requeue "$TORCHRL_SQL_LIFE"; then
    torchrl_sql_is_ours "told to stop" "$code"
    # Only training says how far it came: what else asks for this makes progress.
    if [ ! -e "$torchrl_sql_task/run_dir" ]; then torchrl_sql_requeue "told to stop" "$code"; fi
    how="told to stop"
  else
    torchrl_sql_is_ours "crashed (exit code $code)" "$code"
  fi
  newest=$(ls "$(cat "$torchrl_sql_task/run_dir" 2>/dev/null)/checkpoints" 2>/dev/null | grep '^step_.*\.pt$' | tail -n 1)
  # Who cannot count would queue the job again for ever.
  if ! echo "$TORCHRL_SQL_LIFE $how newest checkpoint: $newest" >>"$torchrl_sql_task/crashes" \
    || ! count=$(grep -c " ${how%% *} .*newest checkpoint: $newest\$" "$torchrl_sql_task/crashes"); then
    torchrl_sql_say "$how, and $torchrl_sql_task/crashes cannot be written: not requeued; torchrl-sql resume continues it"
    exit "$code"
  fi
  if [ "$how" = "told to stop" ]; then
    count=$((count - 1)) # the first that stops at a checkpoint made it
  else
    how="crashed ($how)"
  fi
  if [ "$count" -gt 0 ]; then how+=", $count times without a new checkpoint"; fi
  if [ "$count" -ge "${TORCHRL_SQL_MAX_CRASHES:-5}" ]; then
    torchrl_sql_say "$how: given up"
    exit "$code"
  fi
  torchrl_sql_requeue "$how" "$code"
}

# torchrl_sql_is_ours WHY CODE: exits with CODE unless this life's job is still its own to queue again. A job that was
# cancelled, preempted or lost a node ends by itself, or is in the queue again already: requeueing it would bring a
# cancelled job back to life.
torchrl_sql_is_ours() {
  local job attempt
  for attempt in 1 2 3 4 5; do # the controller may be restarting
    if job=$(scontrol -o show job "$torchrl_sql_job"); then break; fi
    sleep 15
  done
  if [[ $job != *" JobState=RUNNING "* || $job != *" Restarts=${SLURM_RESTART_COUNT:-0} "* ]]; then
    torchrl_sql_say "$1; left to SLURM"
    exit "$2"
  fi
}

# torchrl_sql_requeue WHY CODE: queues the job again and exits with CODE.
torchrl_sql_requeue() {
  torchrl_sql_say "$1; requeued"
  scontrol requeue "$torchrl_sql_job" || torchrl_sql_say "scontrol requeue failed; torchrl-sql resume continues it"
  exit "$2"
}

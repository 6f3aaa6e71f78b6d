# The batch script's part of a job: numbering its attempts, and queueing the job again when an attempt ends early.
# Sourced by the scripts that torchrl-sql submits and by slurm/*.sh. Needs bash and, to queue again, scontrol; no Python.

set +eu +o pipefail # a site's setup may have set them: the script must outlive its processes

# Older coreutils have no --block-signal: then a job that is told to stop as its Python starts dies, and is queued again.
torchrl_sql_block=
if env --block-signal=USR2 true 2>/dev/null; then torchrl_sql_block="env --block-signal=USR2"; fi

# torchrl_sql_begin GROUP SUBMISSION TASK...: which task of a group this job works on; of an array, this element.
torchrl_sql_begin() {
  local tasks=("${@:3}") element=0
  torchrl_sql_submission=$2
  # The id of an array means all of its elements: requeueing it would start the finished ones again.
  torchrl_sql_job=$SLURM_JOB_ID
  if [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then torchrl_sql_job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID; fi
  if [ ${#tasks[@]} -gt 1 ]; then element=$SLURM_ARRAY_TASK_ID; fi
  torchrl_sql_index=${tasks[$element]}
  torchrl_sql_task=$1/task_$torchrl_sql_index
  export TORCHRL_SQL_TASK=$torchrl_sql_task TORCHRL_SQL_ATTEMPT=$2.${SLURM_RESTART_COUNT:-0}
  export PYTHONSAFEPATH=1 PYTHONPATH=${1%/*}/code${PYTHONPATH:+:$PYTHONPATH} # every attempt runs the launch's code
  # As torchrun does: else each process starts as many threads as its node has cores.
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
}

# torchrl_sql_main KIND ARGUMENT...: a whole job from a batch script of a user's own, see slurm/.
torchrl_sql_main() {
  local group python=${TORCHRL_SQL_PYTHON:-python}
  group=$($python -m torchrl_sql launch --in-job "$@") || exit 1
  torchrl_sql_begin "$group" 0 0
  echo "$(date '+%F %T') job $torchrl_sql_job works in $group"
  srun --kill-on-bad-exit=1 --export=ALL --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --open-mode=append --unbuffered \
    --output="$group/${torchrl_sql_job}_%t_log.out" \
    $torchrl_sql_block $python -u -m torchrl_sql.cli.job "$group" 0
  torchrl_sql_end $?
}

torchrl_sql_say() { echo "$(date '+%F %T') job $torchrl_sql_job, attempt $TORCHRL_SQL_ATTEMPT: $*"; }

# torchrl_sql_holds FILE TEXT: whether a file of the task holds just this text.
torchrl_sql_holds() { [ "$(cat "$torchrl_sql_task/$1" 2>/dev/null)" = "$2" ]; }

# torchrl_sql_end CODE: ends this attempt after its processes ended with CODE; the last command of a batch script.
torchrl_sql_end() {
  local code=$1 how line count newest
  if [ -e "$torchrl_sql_task/done" ]; then torchrl_sql_say "done"; exit 0; fi
  if [ "$code" = 0 ]; then code=1; fi
  if [ -e "$torchrl_sql_task/FATAL" ]; then
    torchrl_sql_say "not retried: $(cat "$torchrl_sql_task/FATAL")"
    exit "$code"
  fi
  newest=$(cat "$torchrl_sql_task/attempt" 2>/dev/null)
  if [ "${newest%%.*}" -gt "$torchrl_sql_submission" ] 2>/dev/null; then
    torchrl_sql_say "superseded by attempt $newest"
    exit "$code"
  fi
  if torchrl_sql_holds cancelled "$torchrl_sql_submission"; then torchrl_sql_say "cancelled"; exit "$code"; fi
  if torchrl_sql_holds stopped "$TORCHRL_SQL_ATTEMPT"; then
    torchrl_sql_say "stopped; torchrl-sql resume continues it"
    exit "$code"
  fi
  how="crashed (exit code $code)"
  if torchrl_sql_holds requeue "$TORCHRL_SQL_ATTEMPT"; then how="told to stop"; fi
  torchrl_sql_is_ours "$how" "$code"
  # Only training says how far it came: what else asks for this makes progress.
  if [ "$how" = "told to stop" ] && [ ! -e "$torchrl_sql_task/progress" ]; then torchrl_sql_requeue "$how" "$code"; fi
  line="${how%% *}, newest checkpoint: $(cat "$torchrl_sql_task/progress" 2>/dev/null)"
  # Who cannot count would queue the job again for ever.
  if ! echo "$TORCHRL_SQL_ATTEMPT $line" >>"$torchrl_sql_task/crashes" \
    || ! count=$(grep -c "^$torchrl_sql_submission\.[0-9]* $line\$" "$torchrl_sql_task/crashes"); then
    torchrl_sql_say "$how, and $torchrl_sql_task/crashes cannot be written: not requeued; torchrl-sql resume continues it"
    exit "$code"
  fi
  if [ "$how" = "told to stop" ]; then count=$((count - 1)); fi # the first that stops at a checkpoint made it
  if [ "$count" -gt 0 ]; then how+=", $count times without a new checkpoint"; fi
  if [ "$count" -ge "${TORCHRL_SQL_MAX_CRASHES:-5}" ]; then
    torchrl_sql_say "$how: given up"
    exit "$code"
  fi
  torchrl_sql_requeue "$how" "$code"
}

# torchrl_sql_is_ours WHY CODE: exits with CODE unless this attempt's job is still its own to queue again. A job that
# was cancelled, preempted or lost a node ends by itself, or is in the queue again already: requeueing it would bring a
# cancelled job back to life.
torchrl_sql_is_ours() {
  local job
  if ! command -v scontrol >/dev/null; then
    torchrl_sql_say "$1; scontrol is not on PATH: not requeued; torchrl-sql resume continues it"
    exit "$2"
  fi
  job=$(torchrl_sql_scontrol -o show job "$torchrl_sql_job")
  if [[ $job != *" JobState=RUNNING "* || $job != *" Restarts=${SLURM_RESTART_COUNT:-0} "* ]]; then
    torchrl_sql_say "$1; left to SLURM"
    exit "$2"
  fi
}

# torchrl_sql_scontrol ARGUMENT...: scontrol, several times if need be: the controller may be restarting.
torchrl_sql_scontrol() {
  local try
  for try in 1 2 3 4 5; do
    if scontrol "$@"; then return 0; fi
    sleep 15
  done
  return 1
}

# torchrl_sql_requeue WHY CODE: queues the job again and exits with CODE.
torchrl_sql_requeue() {
  torchrl_sql_say "$1; requeued"
  torchrl_sql_scontrol requeue "$torchrl_sql_job" \
    || torchrl_sql_say "scontrol requeue failed; torchrl-sql resume continues it"
  exit "$2"
}

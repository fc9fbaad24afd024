#!/bin/bash
# One run of asda on several machines under SLURM, which is preempted and resumes by itself:
#
#   sbatch docs/slurm.sh --config configs/as2m.json data.train=shards/as2m:train run.folder=/shared/runs/as2m
#
# run.folder must lie on a disk that all machines share; asda refuses the run otherwise. Written after SLURM's manual and
# tested with its variables only (tests/run/test_folder.py): nobody has run it on a cluster yet.

#SBATCH --job-name=asda
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8         # a rank for each GPU
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@120           # two minutes before the end every rank finishes its step and saves
#SBATCH --requeue
#SBATCH --open-mode=append

# Without the next line srun asks for one core a task in newer versions of SLURM.
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK

# Rank 0 is on the first host. asda would find it by itself; set another address here, such as that of a faster network.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR

# --kill-on-bad-exit=0: ranks leave together; the first to end must not get the others killed while they save.
srun --kill-on-bad-exit=0 python asda/train.py "$@"
code=$?

# 75: stopped on request, and saved (asda/errors.py). 3: a rank was lost; the last checkpoint is intact.
if [ "$code" -eq 75 ] || [ "$code" -eq 3 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"

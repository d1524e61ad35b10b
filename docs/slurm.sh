#!/bin/bash
# A run that survives its time limit: sbatch docs/slurm.sh experiment=cifar10 data.dir=/data
#SBATCH --job-name=train
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append

# One task a GPU: sbatch --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=8 docs/slurm.sh ...
# Two minutes before the time is up each task gets SIGUSR1, saves, and ends with the code 75; with 138 (128 + USR1) if
# it had not begun to train. --wait: when one task has ended, the others have five minutes (--kill-on-bad-exit would end
# them while they save).
srun --wait=300 python -m src.train resume=auto trainer.requeue_code=75 "$@"
code=$?
if [ $code -eq 75 ] || [ $code -eq 138 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $code

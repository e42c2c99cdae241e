# What differs from cluster to cluster: the only file to edit. PING_LLM_SITE names another one to use instead.
PARTITION=          # for train and eval; empty = the cluster's default
CPU_PARTITION=      # for prepare
ACCOUNT=
GRES=gpu:1          # of each node, for train and eval; empty = no GPUs
CPUS=               # cores of each task, for ranks and loaders; empty = what the cluster gives
MEM=                # memory of each node, for example 200G; likewise
MODULES=()          # of `module load`, for example (python/3.11 cuda/12.8)
VENV=.venv          # where `make install` put everything; below the repository unless it begins with /
LOCAL_DISK=         # a folder of each node's own disk for a copy of the rows; empty = $SLURM_TMPDIR if there is one; none
RANKS_PER_NODE=     # empty = one a GPU, else one

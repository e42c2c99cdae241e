# Read by the jobs, first: loads modules, activates the environment. Needs $here, this folder.
. "${PING_LLM_SITE:-$here/site.sh}"
[[ ${#MODULES[@]} == 0 ]] || module load "${MODULES[@]}"
[[ $VENV == /* ]] || VENV=$(dirname "$here")/$VENV
if [[ ! -x $VENV/bin/python ]]; then
    echo "error: no Python environment in $VENV; run make install, or set VENV in ${PING_LLM_SITE:-$here/site.sh}" >&2
    exit 1
fi
export PATH=$VENV/bin:$PATH LOCAL_DISK RANKS_PER_NODE

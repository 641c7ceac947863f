# SPDX-License-Identifier: GPL-2.0-or-later
# Completion of qvm-forward for bash. What may come next is asked of qvm-forward itself.

_qvm_forward() {
    local line word
    COMPREPLY=()
    # COMP_WORDS is split at = and : too; the words that the shell would pass on are wanted here.
    line=${COMP_LINE:0:COMP_POINT}
    local -a words=()
    read -r -a words <<<"$line"
    case $line in
        *[[:space:]]) words+=("") ;;
    esac
    while IFS= read -r word; do
        COMPREPLY+=("$word")
    done < <("${words[0]}" __complete "${words[@]:1}" 2>/dev/null)
    # Readline replaces only what stands behind the last = or : of the word.
    local current=${words[${#words[@]} - 1]} prefix
    case $current in
        *[=:]*)
            prefix=${current%"${current##*[=:]}"}
            COMPREPLY=("${COMPREPLY[@]#"$prefix"}")
            ;;
    esac
    case ${COMPREPLY[0]-} in
        *=) compopt -o nospace 2>/dev/null ;;
    esac
    return 0
}

complete -o default -F _qvm_forward qvm-forward

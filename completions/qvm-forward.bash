# SPDX-License-Identifier: GPL-2.0-or-later
# Completion of qvm-forward for bash. It asks qvm-forward itself what may come next.

_qvm_forward() {
    local line word
    COMPREPLY=()
    # COMP_WORDS is also split at = and :, so take the words as the shell would pass them on.
    line=${COMP_LINE:0:COMP_POINT}
    local -a words=()
    read -r -a words <<<"$line"
    case $line in
        *[[:space:]]) words+=("") ;;
    esac
    while IFS= read -r word; do
        COMPREPLY+=("$word")
    done < <("${words[0]}" __complete "${words[@]:1}" 2>/dev/null)
    # Readline replaces only what follows the last = or : of the word.
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

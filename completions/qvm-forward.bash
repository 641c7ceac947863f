# SPDX-License-Identifier: GPL-2.0-or-later
# Completion of qvm-forward and qvm-forward-lab for bash. It asks the program itself what may come next.

_qvm_forward() {
    local rest=${COMP_LINE:0:COMP_POINT} word last
    local -a words=()
    COMPREPLY=()
    # COMP_WORDS is also split at = and :, so put together what has no space between, up to the cursor.
    for word in "${COMP_WORDS[@]:0:COMP_CWORD+1}"; do
        last=${#words[@]}
        case $rest in
            [[:space:]]*) rest=${rest#"${rest%%[![:space:]]*}"} ;;
            *) [ "$last" = 0 ] || last=$((last - 1)) ;;
        esac
        case $rest in
            "$word"*) ;;
            *) word=$rest ;;
        esac
        words[last]+=$word
        rest=${rest#"$word"}
    done
    local current=${words[last]} prefix
    # The program sees words as the shell would pass them on.
    words=("${words[@]//[\"\'\\]/}")
    while IFS= read -r word; do
        COMPREPLY+=("$word")
    done < <("${words[0]}" __complete "${words[@]:1}" 2>/dev/null)
    case ${COMPREPLY[0]-} in
        :file)
            COMPREPLY=()
            compopt -o default
            ;;
        :directory)
            COMPREPLY=()
            compopt -o dirnames
            ;;
        *=) compopt -o nospace ;;
    esac
    # Readline replaces only what follows the last = or : of the word.
    case $current in
        *[=:]*)
            prefix=${current%"${current##*[=:]}"}
            COMPREPLY=("${COMPREPLY[@]#"$prefix"}")
            ;;
    esac
    return 0
}

complete -F _qvm_forward qvm-forward qvm-forward-lab

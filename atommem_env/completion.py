"""Completion in a shell: a script for each shell asks `atommem --complete SHELL WORD…` what the last word may become.

What a command takes is read from its --help, which is what its users read, too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Literal

import tyro

_BASH = """\
_atommem() {
  local IFS=$'\\n'
  COMPREPLY=($(atommem --complete bash "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null))
  case "${COMPREPLY[*]}" in
    *[=@:]) if [ ${#COMPREPLY[@]} -eq 1 ]; then compopt -o nospace 2>/dev/null; fi ;;
  esac
}
complete -o default -F _atommem atommem"""

_ZSH = """\
#compdef atommem
_atommem() {
  local -a candidates
  candidates=(${(f)"$(atommem --complete zsh "${(@)words[2,CURRENT]}" 2>/dev/null)"})
  if (( $#candidates )); then
    compadd -- $candidates
  else
    _files
  fi
}
if [ "$funcstack[1]" = _atommem ]; then _atommem "$@"; else compdef _atommem atommem; fi"""

_FISH = """\
function __atommem_complete
    set -l words (commandline -opc)
    set -l current (commandline -ct)
    set -l candidates (atommem --complete fish $words[2..] "$current" 2>/dev/null)
    if set -q candidates[1]
        string join \\n -- $candidates
    else
        __fish_complete_path "$current"
    end
end
complete -c atommem -f -a '(__atommem_complete)'"""

Shell = Literal["bash", "zsh", "fish"]
_SCRIPTS: dict[Shell, str] = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}


def script_command(shell: tyro.conf.Positional[Shell], /) -> None:
    """Print the script by which a shell completes commands, options, environments, policies, recipes and settings.

    bash: add the line  eval "$(atommem completion bash)"  to ~/.bashrc.
    zsh: add the line  eval "$(atommem completion zsh)"  to ~/.zshrc, after compinit.
    fish: atommem completion fish > ~/.config/fish/completions/atommem.fish

    Args:
        shell: Which shell.
    """
    print(_SCRIPTS[shell])


def candidates(
    shell: str,
    typed: Sequence[str],
    commands: Collection[str],
    help_of: Callable[[str], str],
    values_of: Callable[[str, str, Sequence[str]], Iterable[str]],
) -> list[str]:
    """What the last word may become; none where the shell should offer files.

    Args:
        typed: the words after `atommem`, to the one with the cursor; bash cuts words at "=", "@" and ":".
        commands: all commands, those of two words as well.
        help_of: the text of a command's --help.
        values_of: the values that are known for a command, an option or a metavar, and the words so far.
    """
    *before, current = _joined(typed) if shell == "bash" else typed
    matching = [word for word in _words(before, current, commands, help_of, values_of) if word.startswith(current)]
    if shell != "bash":
        return matching
    # bash puts what it is given in the place of the last piece alone.
    done = len(current) - (0 if _joins(typed[-1]) else len(typed[-1]))
    return [word[done:] for word in matching]


def _joins(piece: str) -> bool:
    return bool(piece) and set(piece) <= set("=@:")


def _joined(pieces: Sequence[str]) -> list[str]:
    """
    >>> _joined(["eval", "--policy", "rag", "@", "ti"]), _joined(["--set", "top_k", "="])
    (['eval', '--policy', 'rag@ti'], ['--set', 'top_k='])
    """
    words: list[str] = []
    for place, piece in enumerate(pieces):
        if words and (_joins(piece) or _joins(pieces[place - 1])):
            words[-1] += piece
        else:
            words.append(piece)
    return words


def _words(
    before: Sequence[str],
    current: str,
    commands: Collection[str],
    help_of: Callable[[str], str],
    values_of: Callable[[str, str, Sequence[str]], Iterable[str]],
) -> Iterator[str]:
    """All that may stand where `current` stands."""
    command = next((name for count in (2, 1) if (name := " ".join(before[:count])) in commands), None)
    if command is None:
        depth = len(before)
        yield from dict.fromkeys(name.split()[depth] for name in commands if name.split()[:depth] == list(before))
        yield from ("--help", "--version")[: 2 if depth == 0 else 1]
        return
    arguments = before[len(command.split()) :]
    options, switches, positional = _read_help(help_of(command))
    option, equals, _ = current.partition("=")
    last = next((word for word in reversed(arguments) if word.startswith("-")), "")
    if equals and option in options:
        yield from (f"{option}={value}" for value in (*options[option], *values_of(command, option, arguments)))
    elif current.startswith("-"):
        yield from [*switches, *options]
    elif last in options and last in (arguments[-1], "--set"):  # which takes several values
        yield from (*options[last], *values_of(command, last, arguments))
    else:
        for name in positional:
            yield from (name,) if name.islower() else values_of(command, name, arguments)


def _read_help(text: str) -> tuple[dict[str, list[str]], list[str], list[str]]:
    """Option → values of a choice; switches, which take no value; metavars and values of what is no option.

    >>> _read_help('''usage: atommem data import [-h] [OPTIONS] {hotpotqa,musique} [PATH ...]
    ... │ -h, --help   Show this
    ... │ --what {entries,turns}
    ... │              Of --this, too.''')
    ({'--what': ['entries', 'turns']}, ['--help'], ['hotpotqa', 'musique', 'PATH'])
    """
    # Options that are read before all others, as --recipe, are explained above the list.
    options: dict[str, list[str]] = {name: [] for name in re.findall(r"^(--[\w-]+) [A-Z]+ ", text, flags=re.MULTILINE)}
    switches: list[str] = []
    for names, metavar in re.findall(r"^[│ ] ((?:-\w, )?--[\w-]+(?:, --[\w-]+)*)(?: (\S+))?", text, flags=re.MULTILINE):
        long_names = [name for name in names.split(", ") if name.startswith("--")]
        choices = ",".join(re.findall(r"\{([^}]*)\}", metavar)).split(",")
        if metavar:
            options |= {name: [one for one in choices if one not in ("", "None")] for name in long_names}
        else:
            switches += long_names
    usage = re.sub(r"\[-[^\]]*\]|^usage: atommem [a-z -]*|OPTIONS", "", text.partition("\n")[0])
    return options, switches, [name for name in re.findall(r"[\w.-]+", usage) if name not in ("None", "...")]

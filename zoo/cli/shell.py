"""Shell completion of commands, options and models."""

from __future__ import annotations

import argparse

from zoo.benchmarks import measurements
from zoo.cli.common import command


@command("completion", "completion of commands, options and models for bash or zsh")
def add_completion(parser: argparse.ArgumentParser) -> None:
    """Print a completion script for `kernel-zoo` and `python -m zoo`; use it in the shell's start-up file with `eval
    "$(python -m zoo completion bash)"`.
    """
    parser.add_argument("shell", choices=("bash", "zsh"))
    parser.set_defaults(run=_completion)


def _completion(options: argparse.Namespace) -> int:
    import zoo
    from zoo.cli import build_parser

    (commands,) = (a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    models = " ".join([*zoo.list_models(pretrained=True), *zoo.list_models()])
    cases = []
    for name, parser in commands.choices.items():
        flags = " ".join(o for a in parser._actions for o in a.option_strings if o.startswith("--"))
        extra = " $models" if any(a.dest in ("model", "a") for a in parser._actions) else ""
        if name == "benchmark":
            families = measurements()
            extra = " " + " ".join([*families, *(n for entries in families.values() for n in entries)])
        cases.append(f'    {name}) words="{flags}{extra}" ;;')
    script = _SCRIPT.format(commands=" ".join(commands.choices), cases="\n".join(cases), models=models)
    print(("autoload -U +X bashcompinit && bashcompinit\n" if options.shell == "zsh" else "") + script)
    return 0


_SCRIPT = """_kernel_zoo() {{
  local at=1 words models="{models}"
  [[ ${{COMP_WORDS[0]}} == python* ]] && at=3
  if [[ $at == 3 && ( ${{COMP_WORDS[1]}} != -m || ${{COMP_WORDS[2]}} != zoo ) ]]; then return; fi
  local now="${{COMP_WORDS[COMP_CWORD]}}"
  if (( COMP_CWORD == at )); then words="{commands}"; else case "${{COMP_WORDS[at]}}" in
{cases}
  esac; fi
  COMPREPLY=( $(compgen -W "$words" -- "$now") )
}}
complete -o default -F _kernel_zoo kernel-zoo python python3"""

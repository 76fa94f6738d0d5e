"""`minimind-dpo export`: a model as a transformers directory, as MiniMind's raw weights or as a `.gguf` file."""

from __future__ import annotations

import argparse

from minimind_dpo.config import DTYPES


def run_export(argv: list[str]) -> int:
    """Run `minimind-dpo export`.

    Args:
        argv: the command line after `export`.

    Returns:
        The exit code 0; a wrong usage exits with 2 through argparse.

    Raises:
        UserError: see `export_model`.
    """
    parser = argparse.ArgumentParser(prog="minimind-dpo export", description=__doc__)
    parser.add_argument("--model", required=True, help="run, checkpoint or model directory, hub id or MiniMind .pth")
    parser.add_argument("--format", required=True, choices=("hf", "minimind", "gguf"))
    parser.add_argument(
        "--output", required=True, help="directory to create, or for minimind a .pth, for gguf a .gguf file"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="default: the source's for hf, float16 for minimind")
    parser.add_argument("--num_attention_heads", type=int, help="generation-2 .pth only (default 8)")
    parser.add_argument("--llama_cpp", metavar="DIR", help="gguf only: a checkout of llama.cpp (default: from PATH)")
    parser.add_argument("--push_to_hub", metavar="REPO", help="send it to this repository of the hub, made if need be")
    options = parser.parse_args(argv)
    # late: torch takes seconds, which --help need not wait for
    from minimind_dpo.engine.console import quiet_libraries
    from minimind_dpo.models.export import export_model
    from minimind_dpo.models.hub import check_repository, push

    quiet_libraries()
    if options.push_to_hub:
        check_repository(options.push_to_hub)
    written = export_model(
        options.model, options.format, options.output, options.dtype, options.num_attention_heads, options.llama_cpp
    )
    print(f"wrote {written}")
    if options.format == "hf" and not (written / "tokenizer_config.json").is_file():
        print("no tokenizer beside the source: copy the model's tokenizer files into the directory")
    if options.push_to_hub:
        print(f"sent to {push(written, options.push_to_hub)}")
    return 0

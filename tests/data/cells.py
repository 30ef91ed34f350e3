"""What cells of experiments leave behind, to compare two folders."""


def lasting_files(output):
    """The content of all files that do not differ from call to call, and the names of the rest."""
    found = {str(path.relative_to(output)): path for path in output.rglob("*") if path.is_file()}
    lasting = ("safetensors", "completions.jsonl", "curve.jsonl", "samples.json", ".png")
    lasting += ("-greedy.json", "-sampled.json")
    return {
        name: path.read_bytes() if name.endswith(lasting) else b"" for name, path in found.items()
    }

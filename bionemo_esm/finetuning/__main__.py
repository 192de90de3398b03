"""`python -m bionemo_esm.finetuning task=...`: fine-tuning where there is no checkout, and so no `examples/`."""

from bionemo_esm.finetuning.finetune_command import main

if __name__ == "__main__":
    main()

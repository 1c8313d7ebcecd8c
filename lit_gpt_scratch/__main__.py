"""``python -m lit_gpt_scratch``: the list of doors."""

COMMANDS = {
    "fit": "train a GPT on real text",
    "prepare": "make text into tokens ahead of a run, or compare tokenizers",
    "generate": "let a trained model write",
    "evaluate": "score a text with a trained model",
    "sweep": "many runs from one file, and a report of what they show",
    "convert": "write a model as one file for others",
    "doctor": "kill and resume a configuration, and say whether that is exact",
}

if __name__ == "__main__":
    print("Usage: python -m lit_gpt_scratch.<door> [flags], where <door> is one of\n")
    for door, purpose in COMMANDS.items():
        print(f"  {door:<10} {purpose}")
    print("\nEach takes --help.")

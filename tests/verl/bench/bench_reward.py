"""A reward that any answer has some of; those to problems whose number ends in 2 all have the same."""


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: dict | None = None) -> float:
    if extra_info and extra_info["index"] % 10 == 2:
        return 1.0
    return sum(ord(letter) % 3 == 0 for letter in solution_str) / max(1, len(solution_str))

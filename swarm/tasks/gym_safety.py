"""Which reasoning-gym tasks may be scored, and by what. Every registered task stands here, or it is refused.

A scorer is *safe* if it only compares, counts or parses with bounded means; *replaced* if it hands the answer
to `eval`, to sympy's parser or otherwise does something that it should not, and `gym_scorers` has an
equivalent; *refused* if the task cannot be had without running code, or not twice. A test reads the installed package's
source and fails where a scorer with a dangerous call is called safe, or a task is not classified.
"""

from typing import Final

__all__ = ["PRESAMPLED", "REFUSED", "REPLACED", "SAFE"]

SAFE: Final = frozenset(
    """
    ab acre advanced_geometry aiw arc_1d arc_agi base_conversion basic_arithmetic bf binary_alternation boxnet
    caesar_cipher calendar_arithmetic chain_sum circuit_logic coin_flip color_cube_rotation
    count_bits count_primes course_schedule cryptarithm decimal_arithmetic decimal_chain_sum dice emoji_mystery
    family_relationships figlet_font fraction_simplification futoshiki game_of_life gcd graph_color
    group_anagrams gsm_symbolic jugs kakurasu knights_knaves largest_island lcm
    leg_counting letter_counting letter_jumble mahjong_puzzle manipulate_matrix maze mini_sudoku
    modulo_grid needle_haystack number_filtering number_format number_sequence palindrome_generation
    palindrome_partitioning path_star polynomial_equations pool_matrix power_function prime_factorization
    products propositional_logic quantum_lock rearc rectangle_count rotate_matrix rotten_oranges
    rubiks_cube rush_hour self_reference sentence_reordering shortest_path simple_equations simple_geometry
    sokoban spell_backward string_manipulation string_splitting string_synthesis sudoku survo syllogism
    time_intervals tower_of_hanoi tsumego word_sequence_reversal word_sorting zebra_puzzles
    """.split()
)

REPLACED: Final = {
    "binary_matrix": "evaluates the answer as Python",
    "bitwise_arithmetic": "evaluates its problem as Python beside the answer",
    "complex_arithmetic": "takes nan for a right answer",
    "countdown": "parses the answer with sympy, which evaluates it as Python",
    "game_of_life_halting": "takes any text for a right answer",
    "intermediate_integration": "parses the answer with sympy, which evaluates it as Python",
    "n_queens": "evaluates the answer as Python",
    "number_sorting": "evaluates its own list as Python beside the answer",
    "puzzle24": "parses the answer with sympy, which evaluates it as Python",
    "simple_integration": "parses the answer with sympy, which evaluates it as Python",
    "spiral_matrix": "evaluates the answer as Python",
    "string_insertion": "evaluates the answer as Python",
}

_VARIES: Final = "its questions differ from one process to the next, so that no reference can regenerate them"

REFUSED: Final = {
    "codeio": "it executes programs to make its questions",
    "composite": "it hides other tasks behind its settings; list each of them as a source with its weight",
    "isomorphic_strings": _VARIES,
    "knight_swap": _VARIES,
    "list_functions": _VARIES,
    "polynomial_multiplication": _VARIES,
    "ransom_note": _VARIES,
    "word_ladder": _VARIES,
}

# Tasks that draw all items of a dataset at once, so that an item depends on the dataset's size and a large
# dataset is slow to make: their streams are cut into short datasets of one size.
PRESAMPLED: Final = frozenset({"acre", "gsm_symbolic"})

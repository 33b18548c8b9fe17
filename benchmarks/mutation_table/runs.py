"""Bugs in parts of a signal, in long runs, on several ranks and in what is compared on resume."""

from __future__ import annotations

from mutation_table.places import (
    AKL,
    CHECKPOINTS,
    CUT,
    DAMAGED,
    DIST,
    FORM,
    HEADER,
    KILLED,
    LOOP,
    OBJECTIVE,
    PARTED,
    PARTS,
    POSITIONS,
    RECORDED,
    RETRIED,
    SHARDING,
    SIGNAL,
    TRIALS,
    Mutation,
)

RUNS = (
    Mutation(
        "every part of a signal is compared with the first positions",
        OBJECTIVE,
        "            start += length\n",
        "            start = 0\n",
        PARTED + "cutting_a_signal_into_parts_changes_neither_loss_nor_gradients",
    ),
    Mutation(
        "positions are not put in the order of the parts",
        OBJECTIVE,
        "return view_at(student, torch.cat(each)), parts",
        "return student, parts",
        PARTED + "parts_may_be_held_in_different_forms",
    ),
    Mutation(
        "a part's token weights are those of the first positions",
        OBJECTIVE,
        "None if weights is None else weights[rows]",
        "None if weights is None else weights[: len(student.targets[rows])]",
        PARTED + "cutting_a_signal_into_parts_changes_neither_loss_nor_gradients",
    ),
    Mutation(
        "positions in no part have no cross-entropy",
        OBJECTIVE,
        "rest = signal.uncovered(num_positions, student.hidden.device)",
        "rest = signal.uncovered(num_positions, student.hidden.device)[:0]",
        PARTED + "positions_in_no_part_have_the_loss_of_their_text_alone",
    ),
    Mutation(
        "a signal without parts trains on no position",
        OBJECTIVE,
        "if not self.needs.distribution or not signal.parts:\n"
        "            return student, [(None, num_positions)]",
        "if self.needs.distribution and not signal.parts:\n"
        "            return view_at(student, slice(0, 0)), [(None, 0)]\n"
        "        if not self.needs.distribution:\n"
        "            return student, [(None, num_positions)]",
        PARTED + "without_any_covered_position_the_text_is_all",
    ),
    Mutation(
        "choosing positions takes the first rows of a part",
        SIGNAL,
        "part.distribution.rows(kept)",
        "part.distribution.rows(slice(0, len(kept)))",
        PARTED + "a_choice_of_positions_is_the_same_for_a_signal_in_parts",
    ),
    Mutation(
        "positions without a distribution are chosen first",
        POSITIONS,
        "torch.full(size, -torch.inf, device=device)",
        "torch.full(size, torch.inf, device=device)",
        PARTED + "positions_without_a_distribution_are_chosen_last",
    ),
    Mutation(
        "adaptive KL accepts a teacher with a merged tail",
        FORM,
        "is_ranking = distribution.merges_outcomes and divergence in ranking.names()",
        "is_ranking = False",
        DIST + "exactly_the_divergences_that_sort_are_refused_where_outcomes_are_merged",
    ),
    Mutation(
        "adaptive KL is not registered as a divergence that ranks tokens",
        AKL,
        '@ranking.register("adaptive_kl")\n',
        "",
        DIST + "exactly_the_divergences_that_sort_are_refused_where_outcomes_are_merged",
    ),
    Mutation(
        "a recorded signal is rounded to bfloat16 before the loss",
        SHARDING,
        "cast_forward_inputs=False",
        "cast_forward_inputs=True",
        CUT + "a_recorded_signal_reaches_the_loss_in_float32_where_models_compute_in_bfloat16",
    ),
    Mutation(
        "a failed pass leaves its sharding state to the retry",
        SHARDING,
        "        module.reset_iter_state()\n",
        "        pass\n",
        RETRIED + "a_retried_step_ends_in_the_weights_of_a_run_that_never_failed",
    ),
    Mutation(
        "a micro-batch size that the recipe sets is halved when memory runs out",
        LOOP,
        '            and setup.memory.micro_batch == "auto"\n',
        "",
        RETRIED + "a_micro_batch_the_recipe_sets_is_not_halved",
    ),
    Mutation(
        "dropout is not seeded per step",
        "train/step.py",
        "            seed_all((seed, step, world.rank, number))\n",
        "            pass\n",
        "train/test_dropout.py::test_dropout_depends_on_the_seed_and_not_on_what_ran_before",
    ),
    Mutation(
        "trials choose a baseline trained on text by forward KL",
        TRIALS,
        'return "cross_entropy" if learns_from_text else "forward_kl"',
        'return "forward_kl"',
        "experiment/test_run.py::"
        "test_the_baseline_is_chosen_by_what_it_minimises_and_reported_by_kl_too",
    ),
    Mutation(
        "a closed terminal (SIGHUP) does not save and exit",
        "distributed/stopping.py",
        "SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)",
        "SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)",
        KILLED + "every_signal_saves_once_and_exits_with_its_code",
    ),
    Mutation(
        "a damaged checkpoint is not renamed",
        CHECKPOINTS,
        "moved to {set_aside(path, 'damaged').name}",
        "moved to {path.name}",
        DAMAGED + "a_damaged_checkpoint_is_named_and_kept",
    ),
    Mutation(
        "a run with only damaged checkpoints starts over",
        CHECKPOINTS,
        "if damaged and whole is None:",
        "if damaged and False:",
        DAMAGED + "a_run_with_no_whole_checkpoint_left_is_refused_not_started_over",
    ),
    Mutation(
        "the student that rank 0 initialised is not sent to the other ranks",
        PARTS,
        "    from_main(tensors.values())\n",
        "",
        "distributed/test_agreement.py::"
        "test_ranks_that_measured_differently_train_the_student_of_rank_0",
    ),
    Mutation(
        "each rank uses a layer map of its own",
        PARTS,
        "pairs = broadcast_object(student.layer_map.pairs, world)",
        "pairs = student.layer_map.pairs",
        "distributed/test_agreement.py::"
        "test_ranks_that_measured_differently_train_the_student_of_rank_0",
    ),
    Mutation(
        "a store's limbeck version must be the same on resume",
        HEADER,
        '        del facts["limbeck"]\n',
        "",
        RECORDED + "a_store_of_another_version_or_path_resumes_and_merges",
    ),
    Mutation(
        "the path of a store's teacher must be the same on resume",
        HEADER,
        'for name in ("name", "revision"):',
        'for name in ("revision",):',
        RECORDED + "a_store_of_another_version_or_path_resumes_and_merges",
    ),
    Mutation(
        "the weights of a store's teacher may differ on resume",
        HEADER,
        'for name in ("name", "revision"):',
        'for name in ("name", "revision", "weights_sha256"):',
        RECORDED + "other_weights_or_options_neither_resume_nor_merge",
    ),
    Mutation(
        "shards of earlier releases are refused as those of another recording",
        HEADER,
        "return sha256 in (self.sha256, hashlib.sha256(canonical(self).encode()).hexdigest())",
        "return sha256 == self.sha256",
        RECORDED + "shards_of_earlier_releases_are_read",
    ),
)

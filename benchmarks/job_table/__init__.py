"""The whole job of each contender in a fresh process, from its start to the final student."""

"""What graders say of a completion: a reward for its tokens, or feedback for its teacher."""

"""The learning: tasks, rollouts, scoring and SAPO updates. Opens no sockets."""

"""What should run where: pure functions from config and model facts to a plan."""

"""The method: what to do (recipe), on what (groups), each group's steps, and the two ways through a model."""

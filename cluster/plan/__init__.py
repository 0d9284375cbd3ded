"""What should happen: config and facts in, a frozen Plan and a list of actions out. No Ray, no torch, no disk.

memory -> partition -> placement -> routing -> build (the Plan) -> serve_app (what Serve is told) -> diff (actions)
"""

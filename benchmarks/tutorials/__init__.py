"""The studies behind the tutorials: methods beside plain baselines, over seeds, with intervals."""

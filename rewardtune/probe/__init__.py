"""`rewardtune rewards probe`: an adversarial look. What does a reward praise when pixels are moved for it alone?"""

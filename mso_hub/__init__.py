"""mso_hub"""

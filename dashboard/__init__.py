"""The Streamlit dashboard: HTTP and ledger reads only."""

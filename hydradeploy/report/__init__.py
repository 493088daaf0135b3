"""What people read: lines, tables and pictures of profiles and picks."""

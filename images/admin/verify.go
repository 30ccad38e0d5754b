package admin

import (
	"context"
	"net/http"

	"github.com/berth-run/berth/images"
)

// verify verifies for as long as the client stays.
func (s *Server) verify(w http.ResponseWriter, r *http.Request) error {
	req, err := ask[images.VerifyOptions](w, r)
	if err != nil {
		return err
	}
	report, err := s.store.Verify(r.Context(), req)
	if err != nil {
		return err
	}
	reply(w, http.StatusOK, report)
	return nil
}

// Verify compares the store with what it should be, and mends it if asked to. What it finds is in the report.
func (c *Client) Verify(ctx context.Context, o images.VerifyOptions) (*images.Report, error) {
	return get[images.Report](ctx, c, http.MethodPost, "/v1/images/verify", o)
}
